"""What a person means by a model argument."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeinf import catalog
from moeinf.errors import UsageError
from moeinf.manifest import Source
from moeinf.reference import Reference, read_reference
from moeinf.store import is_valid_name


@pytest.mark.parametrize(
    ("argument", "reference"),
    [
        ("org/name", Reference("org/name")),
        ("org/name@v1.0", Reference("org/name", "v1.0")),
        ("org/name@refs/pr/3", Reference("org/name", "refs/pr/3")),
        ("mixtral", Reference("mistralai/Mixtral-8x7B-v0.1", None, "mixtral")),
        ("mixtral@main", Reference("mistralai/Mixtral-8x7B-v0.1", "main", "mixtral")),
        ("/models/x", Reference("/models/x")),
        ("/models/../models/x@1", Reference("/models/x@1")),
        ("no-such-alias", None),
        ("", None),
        ("x" * 5000, None),
        ("org/name/more", None),
        ("org/", None),
        ("https://example.org/x", None),
    ],
)
def test_what_arguments_mean(argument: str, reference: Reference | None) -> None:
    assert read_reference(argument) == reference


def test_a_folder_that_is_there_comes_before_a_hub_id_and_after_an_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("org/name", "mixtral", "plain"):
        (tmp_path / folder).mkdir(parents=True)
    here = str(tmp_path.resolve())
    assert read_reference("org/name") == Reference(f"{here}/org/name")
    assert read_reference("plain") == Reference(f"{here}/plain")
    assert read_reference("mixtral") == Reference("mistralai/Mixtral-8x7B-v0.1", None, "mixtral")
    for spelling in ("./mixtral", "~/mixtral", "plain/../mixtral/", "../" + tmp_path.name + "/mixtral"):
        assert read_reference(spelling) == Reference(f"{here}/mixtral")


def test_a_user_whom_nobody_knows_has_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_reference("~no-such-user/x") == Reference(f"{tmp_path.resolve()}/~no-such-user/x")


def test_an_at_sign_asks_for_a_revision() -> None:
    with pytest.raises(UsageError, match="no revision after the @") as caught:
        read_reference("org/name@")
    assert caught.value.hint == "write org/name@REVISION, or org/name alone"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (Reference("Qwen/Qwen3-30B-A3B"), "qwen3-30b-a3b"),
        (Reference("Qwen/Qwen3-30B-A3B", "v2"), "qwen3-30b-a3b"),
        (Reference("mistralai/Mixtral-8x7B-v0.1", None, "mixtral"), "mixtral"),
        (Reference("/models/My Model (größer)"), "my-model-gr-er"),
        (Reference("/models/.hidden"), "hidden"),
        (Reference("/models/" + "x" * 200), "x" * 96),
    ],
)
def test_names_made_from_references(reference: Reference, name: str) -> None:
    assert reference.default_name == name
    assert is_valid_name(name)


def test_every_alias_is_a_name() -> None:
    assert all(is_valid_name(entry.alias) for entry in catalog.entries())


@pytest.mark.parametrize("folder", ["/", "/models/…", "/models/..."])
def test_a_folder_that_gives_no_name_needs_one(folder: str) -> None:
    with pytest.raises(UsageError, match="no name can be made") as caught:
        _ = Reference(folder).default_name
    assert caught.value.hint == "choose one with --name"


def test_a_source_answers_to_its_own_reference() -> None:
    commit = "abcdef0123" * 4
    stored = Source("org/m@v1", commit)
    assert Reference("org/m", "v1").is_source_of(stored)
    assert Reference("org/m", "abcdef0").is_source_of(stored)
    assert Reference("org/m", commit).is_source_of(stored)
    for other in (Reference("org/m"), Reference("org/m", "abcdef"), Reference("org/m", "v"), Reference("org/n", "v1")):
        assert not other.is_source_of(stored)
    folder = Source("/models/abcdef0@1")
    assert Reference("/models/abcdef0@1").is_source_of(folder)
    assert not Reference("/models/abcdef0").is_source_of(folder)
    for source in (stored, folder, Source("org/m", commit)):
        assert Reference.of(source).is_source_of(source)
