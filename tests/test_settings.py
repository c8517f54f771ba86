from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from moeinf.errors import MoeinfError, UsageError
from moeinf.settings import (
    FEW_PROGRAMS,
    MANY_PROGRAMS,
    TRANSFORMERS,
    EngineOptions,
    check_transformers,
    home_path,
    is_debug,
    keep_programs,
    kept_programs,
    resolve_options,
    tune_libraries,
)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('experts = "10%"\ncontext = 100\nhost-memory = "1GB"\n')
    environ = {"MOEINF_EXPERTS": "20%", "MOEINF_CONTEXT": "200"}
    options = resolve_options({"experts": "30%", "context": None}, environ=environ, home=tmp_path)
    assert options == EngineOptions(experts="30%", context=200, host_memory="1GB")


def test_nothing_given_means_the_defaults(tmp_path: Path) -> None:
    assert resolve_options({}, environ={}, home=tmp_path) == EngineOptions()


@pytest.mark.parametrize(
    ("environ", "config", "message"),
    [
        ({"MOEINF_CONTEXT": "many"}, "", "MOEINF_CONTEXT: 'many' is not a whole number"),
        ({}, 'context = "x"', "config.toml: context: 'x' is not a whole number"),
        ({}, "speed = 3", "unknown keys: speed"),
        ({}, "context =", "is not valid TOML"),
        ({}, "context = 3\n'context-' = 4", "unknown keys: context_"),
        ({}, "host-memory = '1G'\nhost_memory = '2G'", "has host_memory twice"),
        ({}, "device = true", "config.toml: device = True is no text"),
        ({}, "experts = [1]", "config.toml: experts = \\[1\\] is no text"),
        ({}, "experts = 'x'", "config.toml: experts 'x' is neither"),
        ({"MOEINF_EXPERTS": "-3"}, "", "MOEINF_EXPERTS '-3' is neither"),
        ({"MOEINF_HOST_MEMORY": "much"}, "", "MOEINF_HOST_MEMORY 'much' is not a size"),
        ({}, "device_memory = '120%'", "config.toml: device_memory 120% is more than there is"),
        ({"MOEINF_PREFETCH": "always"}, "", "MOEINF_PREFETCH always is not known"),
        ({"MOEINF_THREADS": "0"}, "", "MOEINF_THREADS must be 1 or more"),
        ({"MOEINF_THREADS": "3000"}, "", "MOEINF_THREADS must be 512 or less"),
    ],
)
def test_bad_settings_are_errors(tmp_path: Path, environ: dict[str, str], config: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(config)
    with pytest.raises(UsageError, match=message):
        resolve_options({}, environ=environ, home=tmp_path)


def test_a_home_that_cannot_be_looked_at_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/home", tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="MOEINF_HOME is"):
            home_path({"MOEINF_HOME": str(path)})


def test_a_home_that_leads_nowhere_is_none(tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="a link to what is not there"):
        home_path({"MOEINF_HOME": str(tmp_path / "home")})


def test_a_config_file_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('experts = "10%"\n', encoding="utf-8-sig")
    assert resolve_options({}, environ={}, home=tmp_path) == EngineOptions(experts="10%")


def test_none_is_the_default() -> None:
    assert EngineOptions(device=None, policy=None, threads=None) == EngineOptions()  # type: ignore[arg-type]


def test_home_and_debug() -> None:
    assert home_path({"MOEINF_HOME": "/somewhere"}) == Path("/somewhere")
    assert home_path({}) == Path.home() / ".moeinf"
    assert [is_debug({"MOEINF_DEBUG": value}) for value in ("", "0", "1")] == [False, False, True]


def test_libraries_are_told_what_suits_where_nobody_has_said_otherwise() -> None:
    said = {"GOMP_SPINCOUNT": "7", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}
    unsaid: dict[str, str] = {}
    for environ in (said, unsaid):
        tune_libraries(environ)
    assert [environ.pop("TORCH_CUDNN_SDPA_DEPRIORITIZED") for environ in (said, unsaid)] == ["0", "1"]
    assert (said, unsaid) == ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "1000"})


def test_as_many_programs_are_kept_as_are_planned_for() -> None:
    for said, kept in (({}, FEW_PROGRAMS), ({"LRU_CACHE_CAPACITY": "500"}, 500)):
        environ = dict(said)
        assert kept_programs(FEW_PROGRAMS, environ) == kept
        keep_programs(kept, environ)
        assert environ.items() >= said.items()
        for wanted in (FEW_PROGRAMS, MANY_PROGRAMS):  # another engine of the process can but go by what was said
            assert kept_programs(wanted, environ) == max(map(int, environ.values())) == kept


def test_a_number_of_programs_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="LRU_CACHE_CAPACITY: 'many' is not a whole number"):
        kept_programs(FEW_PROGRAMS, {"LRU_CACHE_CAPACITY": "many"})


def test_libraries_are_told_before_torch_is_imported() -> None:
    told = "import os, sys, moeinf; print('torch' in sys.modules); moeinf.load; print(os.environ['GOMP_SPINCOUNT'])"
    environ = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", told], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1000"]


def test_a_transformers_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("5.21.0", "5.21.0.dev0", "5.100", "6.0rc1"):
        monkeypatch.setattr(metadata, "version", lambda _name, found=found: found)
        check_transformers()
    for found in ("5.20.2", "5.3.0", "4.57.1"):
        monkeypatch.setattr(metadata, "version", lambda _name, found=found: found)
        with pytest.raises(MoeinfError, match=f"transformers {found} is too old"):
            check_transformers()


def test_the_transformers_that_is_named_is_the_one_that_is_asked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert TRANSFORMERS in project["project"]["dependencies"]
