"""Data sets: the names that ship, files in five formats, and data sets of the hub."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_fakes import store_model
from cli_transcripts import CommandLine
from fakehub import FakeHub
from moeinf import datasets, hub
from moeinf.datasets import read_prompts, short_name
from moeinf.errors import (
    HubError,
    IntegrityError,
    ModelNotFoundError,
    MoeinfError,
    UnsupportedError,
    UsageError,
)
from moeinf.locks import exclusive_lock
from moeinf.prompts import SHIPPED, Prompt

REPO = "org/talk"


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the data set at the hub has in it."""
    (tmp_path / "repo").mkdir()
    return tmp_path / "repo"


@pytest.fixture
def fake(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(hub, "_sleep", lambda _: None)
    with FakeHub({f"datasets/{REPO}": folder}) as fake:
        fake.connect(monkeypatch)
        yield fake


# Files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "One.\nStill one.\n\nTwo.\n \n\n", [("One.\nStill one.", ""), ("Two.", "")]),
        ("a.txt", "\ufeffOne.\r\n\r\nTwo.", [("One.", ""), ("Two.", "")]),
        ("a.jsonl", '{"text": "One", "domain": "d"}\n\n{"prompt": "Two"}\n', [("One", "d"), ("Two", "")]),
        ("a.jsonl", '{"text": "One\u2028still"}\r\n{"text": " "}\r\n', [("One\u2028still", "")]),
        ("a.json", '[{"instruction": "One"},\n {"question": "Two"}]', [("One", ""), ("Two", "")]),
        ("a.json", '{"text": "One"}\n{"text": "Two"}\n', [("One", ""), ("Two", "")]),
        ("a.csv", 'id,question,domain\n1,"One,\nstill",d\n2,Two,\n', [("One,\nstill", "d"), ("Two", "")]),
        ("a.csv", f"text\n{'x' * 150_000}\n", [("x" * 150_000, "")]),
        ("a.jsonl", '{"text": "half \\ud83d of one"}', [("half \ufffd of one", "")]),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
            '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": null}]}\n'
            '{"conversation": [{"role": "user", "content": "So"}], "text": null}',
            [("Hi\nHello", ""), ("Why?", ""), ("So", "")],
        ),
    ],
)
def test_files(tmp_path: Path, name: str, content: str, expected: list[tuple[str, str]]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert [(prompt.text, prompt.domain) for prompt in read_prompts(str(tmp_path / name))] == expected
    assert len(read_prompts(str(tmp_path / name), 1)) == 1


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.pdf", b"x", ModelNotFoundError, r"a\.pdf' is no data set"),
        ("a", None, ModelNotFoundError, "is no data set"),
        ("a.txt", None, ModelNotFoundError, "there is no file .*a.txt"),
        ("a.jsonl", b'{"prompt": "hi"}\n\nnot json\n', IntegrityError, "line 3: "),
        ("a.txt", b"", IntegrityError, "holds no prompts"),
        ("a.txt", b"\n \n\n", IntegrityError, "holds no prompts"),
        ("a.txt", b"One.\n\xff", IntegrityError, "is not UTF-8: byte 0xff at 5"),
        ("a.jsonl", b"\n\n", IntegrityError, "holds no prompts"),
        ("a.jsonl", b"{", IntegrityError, "is not a valid jsonl file"),
        ("a.jsonl", b"[1]", IntegrityError, "a row is no object"),
        ("a.jsonl", b"[" * 100_000, IntegrityError, "is not a valid jsonl file"),
        ("a.jsonl", b'{"other": "x", "more": 1}', IntegrityError, "holds no prompts: its rows have other, more"),
        ("a.json", b"[]", IntegrityError, "holds no prompts"),
        ("a.json", b'["x"]', IntegrityError, "a row is no object"),
        ("a.csv", b"text\n", IntegrityError, "holds no prompts"),
        ("a.csv", b'text\n"open', IntegrityError, "is not a valid csv file"),
        ("a.csv", b"id,body\n1,x,2\n", IntegrityError, "holds no prompts: its rows have id, body"),
    ],
)
def test_what_is_no_prompt_file(
    tmp_path: Path, name: str, content: bytes | None, error: type[MoeinfError], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_prompts(str(tmp_path / name))


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_BYTES", 1024)
    (tmp_path / "a.txt").write_bytes(b"x" * 1025)
    with pytest.raises(UsageError, match=r"is larger than 1\.00 KiB"):
        read_prompts(str(tmp_path / "a.txt"))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnsupportedError, match="needs pyarrow, which is not installed"):
        read_prompts(str(tmp_path / "a.parquet"))


def test_parquet_with_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2], "text": ["One", "Two"], "domain": ["d", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [(prompt.text, prompt.domain) for prompt in read_prompts(str(tmp_path / "a.parquet"))] == [
        ("One", "d"),
        ("Two", ""),
    ]
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(IntegrityError, match="its rows have id"):
        read_prompts(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="is not a valid parquet file"):
        read_prompts(str(tmp_path / "a.parquet"))


def test_short_names(tmp_path: Path) -> None:
    (tmp_path / "own set").touch()
    prompts = [Prompt("", "Why?"), Prompt("", "How?")]

    def name(dataset: str) -> str:
        return short_name(dataset, prompts)

    assert name("default") == "default"
    assert name("data/two.jsonl") == name("two.txt") == "two-3afd639f"
    assert name(str(tmp_path / "own set")) == "own--set-3afd639f"
    assert name("org/name@refs/convert/parquet") == "org--name--refs--convert--parquet-3afd639f"
    assert name("org/v1.5") == "org--v1.5-3afd639f"
    assert len(name("x" * 300 + ".txt")) == 96 + 1 + 8
    assert name("x" + "中" * 80 + ".txt") == "x" + "中" * 31 + "-3afd639f", "a file's name has as many bytes as may be"


def test_names_of_other_texts_differ() -> None:
    one, other = [Prompt("a", "Why?")], [Prompt("a", "How?")]
    assert short_name("two.jsonl", one) == short_name("b/two.jsonl", [Prompt("", "Why?")]) != "two"
    assert short_name("two.jsonl", other) != short_name("two.jsonl", one)
    assert short_name("default.jsonl", one) != short_name("default", one) == "default"


# The hub


def test_a_data_set_of_the_hub(fake: FakeHub, folder: Path, home: Path) -> None:
    write(folder, {"README.md": b"x", "load.py": b"x", "data/train.jsonl": rows("One", "Two"), "data/test.jsonl": b"x"})
    said: list[str] = []
    prompts = read_prompts(REPO, notify=said.append)
    commit = fake.commit(f"datasets/{REPO}")
    assert [prompt.text for prompt in prompts] == ["One", "Two"]
    assert said == [f"{REPO} at {commit[:12]}: data/train.jsonl (1 of 1 such files)"]
    assert (home / "datasets/org--talk" / commit / "data/train.jsonl").read_bytes() == rows("One", "Two")
    assert fake.seen("hub", path="/resolve/")[0].path == f"/datasets/{REPO}/resolve/{commit}/data/train.jsonl"
    assert read_prompts(f"{REPO}@main") == read_prompts(f"{REPO}@{commit}", 5) == prompts
    assert len(fake.seen("hub", path="/resolve/")) == 1, "what is here whole is not asked for again"


def test_only_as_many_files_as_needed(fake: FakeHub, folder: Path) -> None:
    write(folder, {f"train-{number}.jsonl": rows(f"a{number}", f"b{number}") for number in range(4)})
    said: list[str] = []
    assert [prompt.text for prompt in read_prompts(REPO, 3, notify=said.append)] == ["a0", "b0", "a1"]
    assert "train-0.jsonl, train-1.jsonl (2 of 4 such files)" in said[0]
    assert len(read_prompts(REPO)) == 2
    assert len(read_prompts(REPO, 99)) == 8


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["test.jsonl", "validation.jsonl", "train.jsonl"], "train.jsonl"),
        (["test.jsonl", "validation.jsonl"], "validation.jsonl"),
        (["latest.jsonl", "test.jsonl", "constrained.jsonl"], "constrained.jsonl, latest.jsonl"),
        (["b/train.jsonl", "a/train-1.jsonl", "a/train-0.jsonl"], "a/train-0.jsonl, a/train-1.jsonl"),
        (["LICENSE.txt", "train.parquet", "dataset_infos.json", "rows.csv"], "rows.csv"),
        (["notes.txt"], "notes.txt"),
    ],
)
def test_which_files_are_taken(fake: FakeHub, folder: Path, files: list[str], taken: str) -> None:
    for name in files:
        write(folder, {name: b"text\nx\n" if name.endswith(".csv") else rows("x")})
    said: list[str] = []
    read_prompts(REPO, 99, notify=said.append)
    assert f": {taken} (" in said[0]


def test_a_file_here_comes_first_and_no_file_is_looked_up(fake: FakeHub, folder: Path) -> None:
    write(folder, {"train.jsonl": rows("there")})
    write(Path("org"), {"talk.jsonl": rows("here")})
    assert [prompt.text for prompt in read_prompts("org/talk.jsonl")] == ["here"]
    (Path("org") / "talk").mkdir()
    with pytest.raises(UsageError, match="org/talk is a folder"):
        read_prompts(REPO)
    for name in ("org/other.jsonl", "other", "a/b/c", "./org/x", "default/", ""):
        with pytest.raises(ModelNotFoundError):
            read_prompts(name)
    for name in SHIPPED:
        assert read_prompts(name, 3)
    assert fake.requests == []


def test_nothing_readable(fake: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"load.py": b"x", "data.arrow": b"x", "dataset_infos.json": b"{}"})
    with pytest.raises(IntegrityError, match="org/talk has no file that is read as prompts") as caught:
        read_prompts(REPO)
    assert "refs/convert/parquet" in str(caught.value.hint)
    monkeypatch.setattr(datasets, "MAX_BYTES", 10)
    write(folder, {"train.jsonl": rows("much too long")})
    with pytest.raises(IntegrityError, match="has no file"):
        read_prompts(REPO)
    assert fake.seen("hub", path="/resolve/") == []


def test_unknown_gated_and_offline(fake: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"train.jsonl": rows("x")})
    with pytest.raises(ModelNotFoundError, match="org/other is not at the hub") as caught:
        read_prompts("org/other")
    assert f"{fake.url}/datasets/org/other" in str(caught.value.hint)
    assert "private data set" in str(caught.value.hint)
    with pytest.raises(ModelNotFoundError, match="has no revision 'v9'"):
        read_prompts(f"{REPO}@v9")
    fake.gated.add(f"datasets/{REPO}")
    with pytest.raises(HubError, match="is gated") as refused:
        read_prompts(REPO)
    assert refused.value.exit_code == 6
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        read_prompts(REPO)


def test_bytes_that_are_not_those_that_the_hub_announced(fake: FakeHub, folder: Path, home: Path) -> None:
    write(folder, {"train.jsonl": rows("x")})
    fake.faults.flips = 2
    with pytest.raises(IntegrityError, match="arrived damaged, twice"):
        read_prompts(REPO)
    assert not list((home / "datasets").rglob("*.jsonl*"))


def test_a_name_that_leads_out_of_the_folder(fake: FakeHub, folder: Path) -> None:
    write(folder, {"train.jsonl": rows("x")})
    fake.faults.extra_files = [{"rfilename": "../train.jsonl", "size": 1, "blobId": "0" * 40}]
    with pytest.raises(IntegrityError, match="unsafe name"):
        read_prompts(REPO)


def test_one_download_at_a_time(fake: FakeHub, folder: Path, home: Path) -> None:
    write(folder, {"train.jsonl": rows("x")})
    with (
        exclusive_lock(home / "datasets/org--talk.lock", "downloading"),
        pytest.raises(MoeinfError, match="org--talk is busy: this process is downloading it"),
    ):
        read_prompts(REPO)


# As it is typed


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    cli = CommandLine(tmp_path / "home", monkeypatch)
    store_model(cli.home)
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    return cli


def test_transcripts_of_data_sets_that_are_none(stored: CommandLine) -> None:
    write(Path(), {"empty.jsonl": b"", "latin.txt": b"caf\xe9", "t.csv": b"id,body\n1,x\n", "folder/x": b""})
    stored.check("""
        $ moeinf trace tiny --dataset empty.jsonl
        ! error: empty.jsonl holds no prompts
        ! hint: give it text
        = 4
    """)
    stored.check("""
        $ moeinf trace tiny --dataset latin.txt
        ! error: latin.txt is not UTF-8: byte 0xe9 at 3
        ! hint: save it as UTF-8
        = 4
    """)
    stored.check("""
        $ moeinf trace tiny --dataset t.csv
        ! error: t.csv holds no prompts: its rows have id, body
        ! hint: call the field with the text one of: text, prompt, question, instruction
        = 4
    """)
    stored.check("""
        $ moeinf trace tiny --dataset folder
        ! error: folder is a folder
        ! hint: give a file in it: .jsonl, .csv, .json, .parquet, .txt
        = 2
    """)
    stored.check("""
        $ moeinf trace tiny --dataset defautl
        ! error: 'defautl' is no data set
        ! hint: give default, default-held-out, a file (.jsonl, .csv, .json, .parquet, .txt), or ORG/NAME of the hub
        = 3
    """)


def test_transcripts_of_hub_errors(stored: CommandLine, fake: FakeHub, folder: Path) -> None:
    write(folder, {"data.arrow": b"x"})
    stored.check("""
        $ moeinf trace tiny --dataset org/talk
        ! error: org/talk has no file that is read as prompts: .jsonl, .csv, .json, .parquet, .txt, up to 1.00 GiB
        ! hint: its revision refs/convert/parquet may have one; or save what you need as a file and give its path
        = 4
    """)
    _, stderr, code = stored.run("trace", "tiny", "--dataset", "org/other")
    assert (code, stderr.splitlines()[0]) == (3, "error: org/other is not at the hub, or it is private")
    fake.gated.add(f"datasets/{REPO}")
    write(folder, {"train.jsonl": rows("x")})
    _, stderr, code = stored.run("trace", "tiny", "--dataset", REPO)
    assert code == 6
    assert "org/talk is gated" in stderr
