"""The store: names, locks, verify, and models that come and go whatever the disk does."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cli_transcripts import CommandLine
from faults import CountingDisk, FailingDisk, PowerLossDisk, RefusingDisk
from moeinf.errors import CapacityError, IntegrityError, ModelNotFoundError, MoeinfError, UsageError
from moeinf.files import FileSystem
from moeinf.incoming import Incoming, is_safe_path
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec, expert_path
from moeinf.store import Store, is_valid_name

KEY = {"source": "org/tiny", "commit": "c" * 40}
LAYOUT = ExpertLayout(4096, (TensorSpec("up", "F32", (4, 8), 0), TensorSpec("down", "F32", (8, 4), 128)))
DENSE_HEADER = b"{}".ljust(64)
DENSE = {"embed": (64, b"e" * 300), "norm": (364, b"n" * 40), "head": (404, b"h" * 100)}
DENSE_SIZE = 504
CONFIG = b'{"model_type": "tiny"}\n'


def make_manifest(source: str = "org/tiny", commit: str | None = "c" * 40) -> Manifest:
    return Manifest(
        source=Source(source, commit),
        architecture="TinyForCausalLM",
        model_type="tiny",
        dtype="float32",
        precision="float32",
        layers=(MoeLayer("model.layers.0.mlp", 3, 2), MoeLayer("model.layers.1.mlp", 2, 2)),
        layout=LAYOUT,
        dense_files=("dense.safetensors",),
        dense_bytes=440,
        kv_token_bytes=16,
        kv_fixed_bytes=0,
        max_context=128,
        files={},
    )


def expert_bytes(layer: int, expert: int) -> bytes:
    return bytes([layer * 16 + expert + 1]) * LAYOUT.file_bytes


def fill(incoming: Incoming, manifest: Manifest) -> None:
    """Write what is not written yet, as a sharder does, and publish."""
    if not incoming.is_done("config.json"):
        incoming.write("config.json", [CONFIG[:5], CONFIG[5:]])
    for index, layer in enumerate(manifest.layers):
        for expert in range(layer.num_experts):
            if not incoming.is_done(expert_path(index, expert)):
                incoming.write(expert_path(index, expert), [expert_bytes(index, expert)])
        incoming.sync()
    if not incoming.is_done("dense.safetensors"):
        writer = incoming.dense("dense.safetensors", DENSE_HEADER, DENSE_SIZE)
        for tensor, (offset, data) in DENSE.items():
            if not writer.is_done(tensor):
                writer.write_at(offset, data)
                writer.mark_done(tensor)
            incoming.sync()
        writer.close()
    incoming.publish(manifest)


def put(home: Path, name: str = "tiny", manifest: Manifest | None = None, disk: FileSystem | None = None) -> bool:
    """Put a model into the store; whether an earlier try was continued."""
    with Store(home, disk=disk).incoming(name) as incoming:
        continued = incoming.begin(KEY)
        fill(incoming, manifest or make_manifest())
    return continued


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def other_process(home: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs `code` with a `store` of this home, says that it is ready, and waits to be ended."""
    lines = ["import sys, pathlib", "from moeinf.store import Store", f"store = Store(pathlib.Path({str(home)!r}))"]
    script = "\n".join([*lines, *code.splitlines(), "    print('ready', flush=True)", "    sys.stdin.read()"])
    source = Path(__file__).parents[1] / "src"
    environ = {**os.environ, "PYTHONPATH": str(source)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """A command line whose store has a model, in a folder where nothing else is."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "home")
    return CommandLine(tmp_path / "home", monkeypatch)


def test_a_model_is_put_found_opened_and_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.names() == []
    put(tmp_path)
    assert store.names() == ["tiny"]
    model = store.open("tiny")
    assert model.path == tmp_path / "models" / "tiny"
    assert model.manifest.source == Source("org/tiny", "c" * 40)
    assert set(tree(model.path)) == {*model.manifest.files, "moeinf.json"}
    for path, record in model.manifest.files.items():
        data = (model.path / path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record.size, record.sha256)
    assert (model.path / "config.json").read_bytes() == CONFIG
    dense = (model.path / "dense.safetensors").read_bytes()
    assert dense == DENSE_HEADER + b"e" * 300 + b"n" * 40 + b"h" * 100
    store.remove("tiny")
    assert store.names() == []
    assert list((tmp_path / "models" / ".trash").iterdir()) == []
    with pytest.raises(ModelNotFoundError):
        store.open("tiny")


def test_reading_a_store_that_is_not_there_makes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    assert store.names() == []
    assert store.unfinished() == []
    for call in (store.open, store.resolve, store.verify, store.remove):
        with pytest.raises(ModelNotFoundError):
            call("nothing")
    assert not (tmp_path / "home").exists()


def test_the_home_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEINF_HOME", str(tmp_path / "there"))
    assert Store().home == tmp_path / "there"


@pytest.mark.parametrize("name", ["a", "Qwen3-30B-A3B", "qwen1.5_moe", "a" * 96, "_x", "x-"])
def test_names_that_are_valid(name: str) -> None:
    assert is_valid_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\n", "a" * 97, "../x", "a\0", "-x"])
def test_names_that_are_not(name: str, tmp_path: Path) -> None:
    assert not is_valid_name(name)
    with pytest.raises(UsageError, match="cannot be a model's name"):
        Store(tmp_path).open(name)
    with pytest.raises(UsageError), Store(tmp_path).incoming(name):
        pass


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\\b", "c:x", "a\0b", "a/"])
def test_paths_that_lead_elsewhere_are_not_written(path: str, tmp_path: Path) -> None:
    assert not is_safe_path(path)
    with Store(tmp_path).incoming("m") as incoming:
        incoming.begin(KEY)
        with pytest.raises(IntegrityError, match="no path inside a model"):
            incoming.write(path, [b"x"])


def test_an_unknown_name_comes_with_near_ones(tmp_path: Path) -> None:
    put(tmp_path, "tiny-model")
    with pytest.raises(ModelNotFoundError) as caught:
        Store(tmp_path).resolve("tiny-modle")
    assert "tiny-model" in (caught.value.hint or "")


def test_near_names_are_near_in_any_case(tmp_path: Path) -> None:
    for name in ("trial", "Other"):
        put(tmp_path, name)
    for argument, hint in (("TRIAL", "did you mean trial or mixtral?"), ("othre", "did you mean Other?")):
        with pytest.raises(ModelNotFoundError) as caught:
            Store(tmp_path).resolve(argument)
        assert caught.value.hint == hint


def test_a_slash_behind_a_name_is_of_no_meaning_unless_a_folder_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    put(home)
    stop_after(home, 1, name="half")
    store = Store(home)
    assert [store.resolve(argument).name for argument in ("tiny/", "tiny//", "org/tiny/")] == ["tiny"] * 3
    for argument, told in (("half/", "half is only partly here"), ("mixtral/", "mixtral is not pulled")):
        with pytest.raises(ModelNotFoundError, match=told):
            store.resolve(argument)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ModelNotFoundError, match="tiny/ is not pulled"):
        store.resolve("tiny/")


@pytest.mark.parametrize("command", ["show", "verify", "rm -y", "run"])
@pytest.mark.parametrize(
    "argument", [".incoming", ".trash", "..", "-x", "other/", "a b", "tiny/moeinf.json", "x" * 5000]
)
def test_what_cannot_be_a_name_is_an_unknown_model(command: str, argument: str, line: CommandLine) -> None:
    stop_after(line.home, 1, name="half")
    Store(line.home).disk.make_folder(line.home / "models" / ".trash")
    _, stderr, code = line.run(*command.split(), "--", argument, given=b"hi")
    assert code == 3
    assert stderr.startswith("error: ")
    assert "no whole model" not in stderr
    assert "hint: moeinf rm" not in stderr
    assert Store(line.home).names() == ["tiny"]


@pytest.mark.parametrize("command", ["show", "verify", "rm -y", "run"])
def test_empty_text_is_no_model(command: str, line: CommandLine) -> None:
    stop_after(line.home, 1, name="half")
    told = "error: the name of the model is empty\nhint: moeinf list shows the models here\n"
    assert line.run(*command.split(), "", given=b"hi") == ("", told, 2)


def test_a_name_with_a_dash_in_front_is_refused(line: CommandLine) -> None:
    line.check("""
        $ moeinf pull org/other --name -x
        ! error: '-x' cannot be a model's name
        ! hint: use up to 96 letters, digits, '.', '_' and '-', and no dot or dash in front
        = 2
    """)


def test_an_alias_that_is_not_pulled_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="mixtral is not pulled") as caught:
        Store(tmp_path).resolve("mixtral")
    assert caught.value.hint == "moeinf pull mixtral"


def test_resolve_by_name_alias_hub_id_revision_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, folder = tmp_path / "home", tmp_path / "checkpoint"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    put(home, "one", make_manifest("mistralai/Mixtral-8x7B-v0.1"))
    put(home, "two", make_manifest("org/two@v1.0", "abcdef0" + "1" * 33))
    put(home, "three", make_manifest(str(folder), None))
    put(home, "longer", make_manifest("org/two-longer"))
    store = Store(home)
    expected = {
        "one": ["one", "mixtral", "mistralai/Mixtral-8x7B-v0.1"],
        "two": ["two", "org/two", "org/two@v1.0", "org/two@abcdef01"],
        "three": ["three", "checkpoint", "./checkpoint", str(folder), f"{folder}/"],
    }
    for name, arguments in expected.items():
        assert {argument: store.resolve(argument).name for argument in arguments} == dict.fromkeys(arguments, name)
    for argument in ("org/two@v2.0", "org/two@abcdef02", "org/other", "./one", "mixtral@v7"):
        with pytest.raises(ModelNotFoundError, match="not pulled"):
            store.resolve(argument)
    with pytest.raises(UsageError, match="no revision"):
        store.resolve("org/two@")


def test_a_repository_that_is_here_twice_must_be_said_by_name(tmp_path: Path) -> None:
    put(tmp_path, "v1", make_manifest("org/m@v1"))
    put(tmp_path, "v2", make_manifest("org/m@v2"))
    with pytest.raises(UsageError, match="v1, v2"):
        Store(tmp_path).resolve("org/m")
    put(tmp_path, "newest", make_manifest("org/m"))
    assert Store(tmp_path).resolve("org/m").name == "newest"


def test_a_damaged_model_does_not_keep_others_from_being_found(tmp_path: Path) -> None:
    put(tmp_path, "good", make_manifest("org/good"))
    put(tmp_path, "bad")
    (tmp_path / "models" / "bad" / "moeinf.json").write_text("{")
    store = Store(tmp_path)
    assert store.resolve("org/good").name == "good"
    assert store.names() == ["bad", "good"]
    with pytest.raises(IntegrityError):
        store.resolve("bad")
    store.remove("bad")
    assert store.names() == ["good"]
    (tmp_path / "models" / "bad" / "moeinf.json").mkdir(parents=True)
    assert store.resolve("org/good").name == "good"


def edit_manifest(home: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = home / "models" / "tiny" / "moeinf.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["files"].update({"../../x": {"size": 1, "sha256": ""}}), "no path inside a model"),
        (lambda raw: raw["files"].pop("experts/L001/E000.safetensors"), "experts/L001/E000"),
        (lambda raw: raw["files"]["experts/L000/E002.safetensors"].update(size=1), "experts/L000/E002"),
        (lambda raw: raw.update(dense_files=["other.safetensors"]), "other.safetensors"),
        (lambda raw: raw["layout"].update(data_offset=100), "aligned"),
        (lambda raw: raw.pop("layers"), "damaged"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_damaged(
    change: Callable[[dict[str, object]], None], message: str, tmp_path: Path
) -> None:
    put(tmp_path)
    edit_manifest(tmp_path, change)
    with pytest.raises(IntegrityError, match=message):
        Store(tmp_path).open("tiny")


def test_a_manifest_that_is_no_text_is_damaged(tmp_path: Path) -> None:
    put(tmp_path)
    (tmp_path / "models" / "tiny" / "moeinf.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IntegrityError, match="no text"):
        Store(tmp_path).open("tiny")


def test_a_folder_without_a_manifest_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert Store(tmp_path).names() == []
    with pytest.raises(IntegrityError, match="no whole model"):
        Store(tmp_path).resolve("mine")


def test_files_are_neither_models_nor_unfinished(tmp_path: Path) -> None:
    put(tmp_path)
    store = Store(tmp_path)
    for folder in (store.models, store.models / ".incoming"):
        (folder / "stray").touch()
    assert (store.names(), store.without_manifest(), store.unfinished()) == (["tiny"], [], [])


def test_list_names_folders_that_are_no_models(line: CommandLine) -> None:
    """They take disk, whatever made them, and nothing else tells of them."""
    for name in ("mine", "half"):
        (line.home / "models" / name).mkdir()
    stop_after(line.home, 1, name="half")
    line.check("""
        $ moeinf list
        | NAME  ARCHITECTURE     EXPERTS         PRECISION  SIZE      SOURCE
        | tiny  TinyForCausalLM  2 x 2/3, top 2  float32    21.8 KiB  org/tiny
        ! half is only partly here: run the command that makes it again to go on, or `moeinf rm half`
        ! mine has no moeinf.json and is no model: make it again with --force, or `moeinf rm mine`
        = 0
    """)
    stdout, _, _ = line.run("list", "--json")
    assert json.loads(stdout)["unfinished"] == ["half", "mine"]
    assert line.run("rm", "-y", "mine", "half") == ("removed mine\nremoved half\n", "", 0)
    assert tree(line.home / "models" / ".incoming") == {}
    assert Store(line.home).without_manifest() == []


def test_list_names_models_that_nobody_can_name(line: CommandLine) -> None:
    """As programs before this one made them: the folder can be renamed."""
    models = line.home / "models"
    stop_after(line.home, 1, name="half")
    (models / "tiny").rename(models / "-x")
    (models / ".incoming" / "half").rename(models / ".incoming" / "-y")
    (models / "lost+found").mkdir()
    line.check("""
        $ moeinf list
        ! warning: HOME/models/-x has a name that no model may have: rename the folder, or remove it
        ! warning: HOME/models/.incoming/-y has a name that no model may have: rename the folder, or remove it
        ! no models here yet; moeinf pull SOURCE brings one, and moeinf chat demo needs none
        = 0
    """)
    (models / "-x").rename(models / "x")
    assert Store(line.home).open("x").name == "x"


DAMAGE: list[Callable[[dict[str, Any]], object]] = [
    lambda raw: raw.update(architecture=None),
    lambda raw: raw["source"].update(repo=None),
    lambda raw: raw["files"]["config.json"].update(size=None),
    lambda raw: raw["layers"][0].update(num_experts=1.5),
    lambda raw: raw["layers"][0].update(top_k=None),
    lambda raw: raw["layout"].update(data_offset="x"),
    lambda raw: raw["layout"]["tensors"][0].update(dtype="x"),
    lambda raw: raw["layout"]["tensors"][0].update(shape=[None]),
    lambda raw: raw.update(layers=[]),
    lambda raw: raw.update(max_context=float("nan")),
    lambda raw: raw.update(dense_bytes=10**400),
]


@pytest.mark.parametrize("change", DAMAGE)
def test_a_damaged_manifest_keeps_no_other_model_from_being_listed(
    change: Callable[[dict[str, Any]], object], line: CommandLine
) -> None:
    put(line.home, "other")
    edit_manifest(line.home, change)
    stdout, stderr, code = line.run("list", "--json")
    assert [model["name"] for model in json.loads(stdout)["models"]] == ["other"]
    assert stderr.startswith("warning: tiny: moeinf.json is damaged: ")
    assert len(stderr.splitlines()) == 1
    assert code == 0
    assert line.run("show", "tiny")[2] == IntegrityError.exit_code


def test_verify_finds_every_kind_of_damage(tmp_path: Path) -> None:
    put(tmp_path)
    store = Store(tmp_path)
    folder = store.path("tiny")
    assert store.verify("tiny") == []
    flipped = bytearray((folder / expert_path(0, 1)).read_bytes())
    flipped[-1] ^= 1
    (folder / expert_path(0, 1)).write_bytes(flipped)
    (folder / expert_path(0, 2)).write_bytes(b"short")
    (folder / expert_path(1, 0)).unlink()
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "traces").mkdir()
    (folder / "traces" / "one.safetensors").write_text("learned")
    (folder / "experts" / "traces").mkdir()
    for stray in ("traces/one.safetensors", "moeinf.json"):
        (folder / "experts" / stray).write_text("lost")
    assert {problem.path: problem.what for problem in store.verify("tiny")} == {
        expert_path(0, 1): "has other bytes than were written",
        expert_path(0, 2): "5 B (5 bytes) instead of 4352 bytes",
        expert_path(1, 0): "is missing",
        "config.json": "cannot be read: Is a directory",
        "notes.txt": "does not belong to the model",
        "experts/traces/one.safetensors": "does not belong to the model",
        "experts/moeinf.json": "does not belong to the model",
    }


def test_verify_counts_every_byte(tmp_path: Path) -> None:
    class Recorder:
        total = done = 0

        @contextmanager
        def task(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Recorder]:
            self.total = total
            yield self

        def advance(self, amount: int) -> None:
            self.done += amount

    put(tmp_path)
    recorder = Recorder()
    Store(tmp_path).verify("tiny", recorder)
    assert recorder.done == recorder.total == Store(tmp_path).open("tiny").manifest.stored_bytes


def test_nobody_may_change_a_model_while_it_is_verified(tmp_path: Path) -> None:
    class Changing:
        @contextmanager
        def task(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[Changing]:
            with pytest.raises(MoeinfError, match="tiny is busy: this process is using it"):
                Store(tmp_path).remove("tiny")
            yield self

        def advance(self, amount: int) -> None:
            pass

    put(tmp_path)
    assert Store(tmp_path).verify("tiny", Changing()) == []


def test_many_may_use_a_model_but_nobody_may_change_it_meanwhile(tmp_path: Path) -> None:
    put(tmp_path)
    store = Store(tmp_path)
    with other_process(tmp_path, "with store.hold('tiny'):") as process:
        with store.hold("tiny"):
            assert store.verify("tiny") == []
        with pytest.raises(MoeinfError, match="tiny is busy"):
            store.remove("tiny")
        with pytest.raises(MoeinfError, match="tiny is busy"):
            put(tmp_path)
        assert store.names() == ["tiny"]
        process.kill()
        process.wait()
        store.remove("tiny")


def test_a_model_that_somebody_is_putting_in_place_is_left_to_him(tmp_path: Path) -> None:
    put(tmp_path)
    new = make_manifest(commit="d" * 40)
    with Store(tmp_path).incoming("tiny") as incoming:
        incoming.begin(KEY)
        fill(incoming, new)
        assert Store(tmp_path).open("tiny").manifest.source.commit == "c" * 40
        assert incoming.model.is_dir()
    assert Store(tmp_path).open("tiny").manifest.source.commit == "d" * 40


def test_a_busy_model_says_who_has_it(tmp_path: Path) -> None:
    put(tmp_path)
    store = Store(tmp_path)
    with (
        other_process(tmp_path, "with store.hold('tiny'):") as process,
        pytest.raises(MoeinfError, match=f"process {process.pid} is using it"),
    ):
        store.remove("tiny")
    with (
        other_process(tmp_path, "with store.incoming('new'):") as process,
        pytest.raises(MoeinfError, match=f"process {process.pid} is pulling it"),
        store.incoming("new"),
    ):
        pass
    with store.hold("tiny"), pytest.raises(MoeinfError, match="this process is using it"):
        store.remove("tiny")


def test_who_may_not_write_the_lock_file_still_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path)
    store, open_file = Store(tmp_path), os.open

    def open_as_guest(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, flags, mode)

    with ExitStack() as held:
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", open_as_guest)
            held.enter_context(store.hold("tiny"))
        with pytest.raises(MoeinfError, match="tiny is busy"):
            store.remove("tiny")
    store.remove("tiny")


def test_a_model_that_was_replaced_since_it_was_opened_is_not_used(tmp_path: Path) -> None:
    put(tmp_path)
    model = Store(tmp_path).open("tiny")
    put(tmp_path, manifest=make_manifest(commit="d" * 40))
    with pytest.raises(MoeinfError, match="tiny was replaced meanwhile"), model.use():
        pass


def test_a_lock_file_that_knows_only_the_dead_names_nobody(tmp_path: Path) -> None:
    put(tmp_path)
    store = Store(tmp_path)
    with other_process(tmp_path, "with store.hold('tiny'):"):
        (tmp_path / "locks" / "tiny.lock").write_text("0 using\n")
        for text in ("99999999999999999999 using\n", "nonsense", ""):
            (tmp_path / "locks" / "tiny.lock").write_text(text)
            with pytest.raises(MoeinfError, match="another process is using it"):
                store.remove("tiny")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A home with a model, where nothing can be written."""
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    put(tmp_path)
    shutil.rmtree(tmp_path / "locks")
    folders = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield tmp_path
    for folder in folders:
        folder.chmod(0o755)


def test_a_home_that_cannot_be_written_can_be_used(read_only: Path) -> None:
    store = Store(read_only)
    assert store.names() == ["tiny"]
    with store.hold("tiny"):
        assert store.verify("tiny") == []
    for change in (lambda: store.remove("tiny"), lambda: put(read_only, "other")):
        with pytest.raises(UsageError, match="no access to"):
            change()


def test_a_model_that_may_not_be_looked_into_keeps_no_other_from_being_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path)
    put(tmp_path, "private")
    stat = os.stat

    def stat_as_guest(path: Any, **how: Any) -> os.stat_result:
        if Path(path).parent.name == "private":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", stat_as_guest)
    store = Store(tmp_path)
    assert store.names() == ["private", "tiny"]
    assert store.without_manifest() == []


@pytest.mark.parametrize("closed", [".incoming", "half"])
def test_a_pull_that_may_not_be_looked_into_keeps_no_model_from_being_found(
    closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path)
    stop_after(tmp_path, 1, name="half")
    stat, listdir = os.stat, os.listdir

    def as_guest(function: Callable[..., Any]) -> Callable[..., Any]:
        def refusing(path: Any, **how: Any) -> Any:
            if closed in Path(path, "x" if function is listdir else "").parts[:-1]:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, **how)

        return refusing

    monkeypatch.setattr(os, "stat", as_guest(stat))
    monkeypatch.setattr(os, "listdir", as_guest(listdir))
    store = Store(tmp_path)
    assert store.names() == ["tiny"]
    with store.hold("tiny"):
        pass


def test_a_disk_that_is_read_only_or_full_is_told_apart(tmp_path: Path) -> None:
    for code, kind, word in (
        (errno.EROFS, UsageError, "no access"),
        (errno.ENOSPC, CapacityError, "no room"),
        (errno.EDQUOT, CapacityError, "no room"),
        (errno.EIO, MoeinfError, "the disk failed"),
    ):
        with pytest.raises(kind, match=word) as caught:
            put(tmp_path, disk=FailingDisk(20, code))
        assert caught.value.hint


def count_operations(tmp_path: Path) -> int:
    disk = CountingDisk()
    put(tmp_path, disk=disk)
    return disk.operations


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    home = tmp_path_factory.mktemp("whole")
    put(home)
    return tree(home / "models" / "tiny")


def check_after_fault(home: Path, whole: dict[str, bytes]) -> None:
    """After any fault: no model, or the whole one; and the next try makes the whole one, without leaving anything."""
    store = Store(home)
    if "tiny" in store.names():
        assert store.verify("tiny") == []
        assert tree(store.path("tiny")) == whole
    put(home)
    assert store.verify("tiny") == []
    assert tree(home / "models" / "tiny") == whole
    assert store.unfinished() == []
    assert {path.name for path in (home / "models").iterdir()} <= {"tiny", ".incoming", ".trash"}
    assert tree(home / "models" / ".incoming") == {}
    assert not (home / "models" / ".trash").exists() or tree(home / "models" / ".trash") == {}


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["broken", "full"])
def test_whatever_operation_fails_the_next_pull_makes_it_whole(
    for_ever: bool, code: int, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for number in itertools.count(1):
        home, disk = tmp_path / str(number), FailingDisk(number, code, for_ever=for_ever)
        try:
            put(home, disk=disk)
        except MoeinfError:
            assert disk.has_failed
        else:
            break
        check_after_fault(home, whole)
    assert not disk.has_failed
    assert number > 50


def test_whenever_the_power_fails_the_next_pull_makes_it_whole(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for number in itertools.count(1):
        home, disk = tmp_path / str(number), PowerLossDisk(number)
        try:
            put(home, disk=disk)
        except MoeinfError:
            assert disk.has_failed
        else:
            break
        check_after_fault(home, whole)
    assert number > 50


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_whatever_operation_fails_a_replaced_model_is_the_old_or_the_new_one(for_ever: bool, tmp_path: Path) -> None:
    new = make_manifest(commit="d" * 40)
    for number in itertools.count(1):
        home, disk = tmp_path / str(number), FailingDisk(number, for_ever=for_ever)
        put(home)
        with suppress(MoeinfError):
            put(home, manifest=new, disk=disk)
        store = Store(home)
        assert store.open("tiny").manifest.source.commit in ("c" * 40, "d" * 40)
        assert store.verify("tiny") == []
        if not disk.has_failed:
            break
    assert store.open("tiny").manifest.source.commit == "d" * 40


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_whatever_operation_fails_a_removed_model_is_whole_or_gone(for_ever: bool, tmp_path: Path) -> None:
    for number in itertools.count(1):
        home, disk = tmp_path / str(number), FailingDisk(number, for_ever=for_ever)
        put(home)
        try:
            Store(home, disk=disk).remove("tiny")
        except MoeinfError:
            assert disk.has_failed
        store = Store(home)
        if store.names():
            assert store.verify("tiny") == []
            store.remove("tiny")
        assert store.names() == []
        store.recover()
        assert tree(home / "models") == {}
        if not disk.has_failed:
            break
    assert number > 5


class NotingDisk(FileSystem):
    """A disk that notes what becomes of the names in a folder, in order, and whether that is durable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if source.parent == self.folder:
            self.notes.append(f"{source.name} goes")
        elif target.parent == self.folder:
            self.notes.append(f"{target.name} comes")

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        if path == self.folder:
            self.notes.append("durable")

    def remove_tree(self, path: Path) -> None:
        if path.parent in (self.folder / ".trash", self.folder / ".incoming"):
            self.notes.append(f"{path.parent.name} is emptied")
        super().remove_tree(path)


def test_models_come_and_go_for_good_before_anything_is_deleted(tmp_path: Path) -> None:
    """Or a power failure could bring a model back of which files are gone."""
    put(tmp_path)
    disk = NotingDisk(tmp_path / "models")
    put(tmp_path, disk=disk)
    begun = disk.notes.index("tiny goes")
    assert disk.notes[begun:] == [
        "tiny goes", "durable", "tiny comes", "durable", ".incoming is emptied", ".trash is emptied",
    ]  # fmt: skip
    disk.notes.clear()
    Store(tmp_path, disk=disk).remove("tiny")
    assert disk.notes == ["tiny goes", "durable", ".trash is emptied"]


def test_what_was_learned_about_a_model_survives_its_replacement(tmp_path: Path) -> None:
    put(tmp_path)
    traces = tmp_path / "models" / "tiny" / "traces"
    traces.mkdir()
    (traces / "one.safetensors").write_text("learned")
    put(tmp_path)
    assert (traces / "one.safetensors").read_text() == "learned"
    assert Store(tmp_path).verify("tiny") == []


def test_what_was_learned_survives_where_a_link_leads_to_another_disk(tmp_path: Path) -> None:
    put(tmp_path)
    place, there = tmp_path / "models" / "tiny", tmp_path / "there"
    place.rename(there)
    place.symlink_to(there)
    (there / "traces").mkdir()
    (there / "traces" / "one.safetensors").write_text("learned")
    put(tmp_path, disk=RefusingDisk(errno.EXDEV, place / "traces"))
    assert (place / "traces" / "one.safetensors").read_text() == "learned"
    assert not place.is_symlink()
    assert Store(tmp_path).verify("tiny") == []


def stop_after(home: Path, writes: int, key: dict[str, str] = KEY, name: str = "tiny") -> bool:
    """A pull that stops after some experts; whether it went on from an earlier one."""
    with Store(home).incoming(name) as incoming:
        continued = incoming.begin(key)
        for expert in range(writes):
            incoming.write(expert_path(0, expert), [expert_bytes(0, expert)])
        incoming.sync()
    return continued


def test_an_unfinished_pull_is_continued(tmp_path: Path, whole: dict[str, bytes]) -> None:
    assert not stop_after(tmp_path, 2)
    store = Store(tmp_path)
    assert store.names() == []
    assert store.unfinished() == ["tiny"]
    with pytest.raises(ModelNotFoundError, match="partly here"):
        store.open("tiny")
    with store.incoming("tiny") as incoming:
        assert incoming.begin(KEY)
        assert [incoming.is_done(expert_path(0, expert)) for expert in range(3)] == [True, True, False]
        assert incoming.written_bytes == 2 * LAYOUT.file_bytes
        fill(incoming, make_manifest())
    assert tree(store.path("tiny")) == whole


def test_an_unfinished_pull_of_something_else_is_started_afresh(tmp_path: Path) -> None:
    stop_after(tmp_path, 2)
    with Store(tmp_path).incoming("tiny") as incoming:
        assert not incoming.begin({**KEY, "commit": "d" * 40})
        assert not incoming.is_done(expert_path(0, 0))
        assert tree(incoming.model) == {}


def test_a_pull_that_was_published_is_put_in_place_before_the_next_one_begins(tmp_path: Path) -> None:
    """As if nobody had looked into the store after a crash."""
    put(tmp_path)
    models = tmp_path / "models"
    (models / ".incoming" / "tiny").mkdir()
    (models / "tiny").rename(models / ".incoming" / "tiny" / "model")
    with Store(tmp_path).incoming("tiny") as incoming:
        assert not incoming.begin({**KEY, "commit": "d" * 40})
    assert Store(tmp_path).open("tiny").manifest.source.commit == "c" * 40


def test_an_unfinished_pull_can_be_removed(tmp_path: Path) -> None:
    stop_after(tmp_path, 2)
    Store(tmp_path).remove("tiny")
    assert Store(tmp_path).unfinished() == []
    assert tree(tmp_path / "models") == {}


def test_what_was_not_synced_is_not_done(tmp_path: Path) -> None:
    with Store(tmp_path).incoming("tiny") as incoming:
        incoming.begin(KEY)
        incoming.write("config.json", [CONFIG])
        assert incoming.is_done("config.json")
    with Store(tmp_path).incoming("tiny") as incoming:
        assert incoming.begin(KEY)
        assert not incoming.is_done("config.json")


@pytest.mark.parametrize("tail", [b'{"path": "experts/L000/E0', b'{"path": 7}\n', b"\0" * 50, b"\xff\xfe\n", b"[1]\n"])
def test_a_torn_journal_counts_up_to_the_tear(tail: bytes, tmp_path: Path) -> None:
    stop_after(tmp_path, 2)
    journal = tmp_path / "models" / ".incoming" / "tiny" / "journal.jsonl"
    good = journal.read_bytes()
    journal.write_bytes(good + tail)
    assert stop_after(tmp_path, 0)
    assert journal.read_bytes() == good
    with Store(tmp_path).incoming("tiny") as incoming:
        incoming.begin(KEY)
        assert incoming.is_done(expert_path(0, 1))


def test_files_that_the_disk_lost_are_written_again(tmp_path: Path) -> None:
    stop_after(tmp_path, 3)
    model = tmp_path / "models" / ".incoming" / "tiny" / "model"
    (model / expert_path(0, 0)).unlink()
    (model / expert_path(0, 1)).write_bytes(b"short")
    with Store(tmp_path).incoming("tiny") as incoming:
        assert incoming.begin(KEY)
        assert [incoming.is_done(expert_path(0, expert)) for expert in range(3)] == [False, False, True]


def test_dense_tensors_survive_an_interruption_unless_the_header_changes(tmp_path: Path) -> None:
    def start(header: bytes) -> list[bool]:
        with Store(tmp_path).incoming("tiny") as incoming:
            incoming.begin(KEY)
            writer = incoming.dense("dense.safetensors", header, DENSE_SIZE)
            done = [writer.is_done(tensor) for tensor in DENSE]
            offset, data = DENSE["norm"]
            writer.write_at(offset, data)
            writer.mark_done("norm")
            incoming.sync()
        return done

    assert start(DENSE_HEADER) == [False, False, False]
    assert start(DENSE_HEADER) == [False, True, False]
    assert start(b"{} ".ljust(63) + b"x") == [False, False, False]


def test_a_writer_that_breaks_off_leaves_no_file_that_counts(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"first"
        raise IntegrityError("the source is damaged")

    with Store(tmp_path).incoming("tiny") as incoming:
        incoming.begin(KEY)
        with pytest.raises(IntegrityError):
            incoming.write("config.json", chunks())
    with Store(tmp_path).incoming("tiny") as incoming:
        assert incoming.begin(KEY)
        assert not incoming.is_done("config.json")


def test_any_buffer_can_be_written(tmp_path: Path) -> None:
    grid = memoryview(bytes(range(12))).cast("H").cast("B").cast("B", (3, 4))
    with Store(tmp_path).incoming("tiny") as incoming:
        incoming.begin(KEY)
        incoming.write("a.bin", [b"", bytearray(b"x"), grid, memoryview(b"")])
        assert (incoming.model / "a.bin").read_bytes() == b"x" + bytes(range(12))


def test_many_small_files_share_a_sync_of_the_journal(tmp_path: Path) -> None:
    disk = CountingDisk()
    with Store(tmp_path, disk=disk).incoming("tiny") as incoming:
        incoming.begin(KEY)
        before = disk.operations
        for number in range(640):
            incoming.write(f"f{number}", [b"x"])
    journal = 10 * 2
    assert disk.operations - before == 640 * 3 + journal


def test_strays_of_an_earlier_try_do_not_get_into_the_model(tmp_path: Path, whole: dict[str, bytes]) -> None:
    stop_after(tmp_path, 1)
    (tmp_path / "models" / ".incoming" / "tiny" / "model" / "experts" / "stray").write_text("x")
    put(tmp_path)
    assert tree(tmp_path / "models" / "tiny") == whole


def test_what_the_trash_does_not_let_go_of_keeps_nobody_from_reading(tmp_path: Path) -> None:
    put(tmp_path)
    put(tmp_path, "other")
    old = tmp_path / "models" / ".trash" / "old"
    old.mkdir(parents=True)
    clinging = Store(tmp_path, disk=RefusingDisk(errno.ENOTEMPTY, old))
    assert clinging.names() == ["other", "tiny"]
    clinging.remove("other")
    assert old.exists()
    assert Store(tmp_path).names() == ["tiny"]
    assert not old.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EXDEV], ids=["full", "elsewhere"])
def test_a_model_that_cannot_be_put_in_place_keeps_no_other_from_being_found(code: int, tmp_path: Path) -> None:
    for name in ("one", "other", "tiny"):
        put(tmp_path, name)
    incoming = tmp_path / "models" / ".incoming"
    for name in ("one", "other"):
        (incoming / name).mkdir()
        (tmp_path / "models" / name).rename(incoming / name / "model")
    assert Store(tmp_path, disk=RefusingDisk(code, incoming / "one" / "model")).names() == ["other", "tiny"]
    assert Store(tmp_path).names() == ["one", "other", "tiny"]


def test_a_disk_without_room_for_the_trash_lets_a_model_go(tmp_path: Path) -> None:
    put(tmp_path)
    Store(tmp_path, disk=RefusingDisk(errno.ENOSPC, tmp_path / "models" / ".trash")).remove("tiny")
    assert tree(tmp_path / "models") == {}


def test_without_a_trash_the_manifest_goes_first(tmp_path: Path) -> None:
    """What is left is no model, whatever happens then."""
    put(tmp_path)
    places = [tmp_path / "models" / ".trash", tmp_path / "models" / "tiny" / "config.json"]
    with pytest.raises(CapacityError):
        Store(tmp_path, disk=RefusingDisk(errno.ENOSPC, *places)).remove("tiny")
    assert Store(tmp_path).without_manifest() == ["tiny"]


def test_without_a_trash_a_published_pull_is_none_first(tmp_path: Path) -> None:
    put(tmp_path)
    models = tmp_path / "models"
    (models / ".incoming/tiny").mkdir(parents=True)
    (models / "tiny").rename(models / ".incoming/tiny/model")
    with pytest.raises(CapacityError):
        Store(
            tmp_path, disk=RefusingDisk(errno.ENOSPC, models / ".trash", models / ".incoming/tiny/model/config.json")
        ).remove("tiny")
    assert Store(tmp_path).names() == []


def test_what_is_no_model_goes_without_a_trash_too(tmp_path: Path) -> None:
    put(tmp_path)
    (tmp_path / "models/stray").touch()
    (tmp_path / "models/odd/moeinf.json").mkdir(parents=True)
    store = Store(tmp_path, disk=RefusingDisk(errno.ENOSPC, tmp_path / "models/.trash"))
    for name in ("stray", "odd"):
        store.remove(name)
    assert {"stray", "odd"}.isdisjoint(os.listdir(tmp_path / "models"))


def test_removing_never_follows_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    home = tmp_path / "home"
    put(home)
    (home / "models" / "tiny" / "link").symlink_to(outside)
    (home / "models" / "linked").symlink_to(outside)
    Store(home).remove("tiny")
    Store(home).remove("linked")
    assert (outside / "precious").read_text() == "x"
    assert tree(home / "models") == {}
