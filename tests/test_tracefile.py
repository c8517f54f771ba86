"""Trace files: what is written is read again, and what is damaged or no trace is refused, saying why."""

from __future__ import annotations

import errno
import itertools
import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from faults import FailingDisk, PowerLossDisk
from moeinf import tracefile
from moeinf.errors import CapacityError, IntegrityError, MoeinfError, UnsupportedError, UsageError
from moeinf.tracefile import read_trace, write_json_lines, write_trace
from traces import ARRAYS, assert_same, make_trace, random_trace

SOURCE = Path(tracefile.__file__).parents[1]
DOCUMENT = SOURCE.parent / "docs" / "trace-format.md"


@pytest.mark.parametrize("write", [write_trace, write_json_lines])
@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_is_read_again(tmp_path: Path, seed: int, write: Callable[..., None]) -> None:
    trace = random_trace(seed)
    write(trace, tmp_path / "some.trace")
    found = read_trace(tmp_path / "some.trace")
    if trace.num_tokens == 0 and write is write_json_lines:
        assert found.num_tokens == 0  # no token, so nothing says whether tokens have weights
    else:
        assert_same(found, trace)
    assert [path.name for path in tmp_path.iterdir()] == ["some.trace"]


def test_anybody_can_read_it_without_moeinf(tmp_path: Path) -> None:
    """By the description in docs/trace-format.md: a length, a JSON header, and the tensors."""
    trace = make_trace()
    write_trace(trace, tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"]["format"] == "moeinf-trace"
    assert json.loads(header["__metadata__"]["layer_sizes"]) == [8, 4]
    entry = header["experts"]
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    experts = np.frombuffer(data[begin:end], "<i2").reshape(entry["shape"])
    assert entry["dtype"] == "I16"
    assert np.array_equal(experts, trace.experts)


def spoiled(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A trace file whose header was changed."""
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "moeinf-trace",
            "version": "1",
            "model": "m",
            "architecture": "",
            "source_repo": "",
            "source_commit": "",
            "layer_sizes": "[4]",
            "top_k": "[1]",
        },
        "sequence_id": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]},
        "position": {"dtype": "I32", "shape": [2], "data_offsets": [8, 16]},
        "experts": {"dtype": "I16", "shape": [2, 1, 1], "data_offsets": [16, 20]},
        "is_prefill": {"dtype": "BOOL", "shape": [2], "data_offsets": [20, 22]},
    }
    change(header)
    text = json.dumps(header).encode()
    data = np.array([0, 0, 0, 1], "<i4").tobytes() + np.array([1, 3], "<i2").tobytes() + b"\0\0"
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda header: None, None),
        (lambda header: header["__metadata__"].update(version="2"), UnsupportedError),
        (lambda header: header["__metadata__"].update(layer_sizes="[2]"), IntegrityError),
        (lambda header: header["__metadata__"].update(layer_sizes="[4, 4]"), IntegrityError),
        (lambda header: header["__metadata__"].update(layer_sizes="many"), IntegrityError),
        (lambda header: header["__metadata__"].pop("top_k"), IntegrityError),
        (lambda header: header["__metadata__"].pop("format"), MoeinfError),
        (lambda header: header.pop("is_prefill"), IntegrityError),
        (lambda header: header["experts"].update(dtype="U16"), IntegrityError),
        (lambda header: header["experts"].update(shape=[1, 2, 1]), IntegrityError),
        (lambda header: header["experts"].update(data_offsets=[16, 99]), IntegrityError),
        (lambda header: header["sequence_id"].update(shape=[1 << 40]), IntegrityError),
    ],
)
def test_headers_that_lie_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], error: type[MoeinfError] | None
) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(spoiled(change))
    if error is None:
        assert read_trace(path).experts.ravel().tolist() == [1, 3]
        return
    with pytest.raises(error) as caught:
        read_trace(path)
    assert "t.safetensors" in str(caught.value)


def test_the_reference_implementation_reads_and_writes_it(tmp_path: Path) -> None:
    trace = make_trace(foreseen=True)
    write_trace(trace, tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in ARRAYS}
    for name in ARRAYS:
        assert arrays[name].dtype == getattr(trace, name).dtype
        assert np.array_equal(arrays[name], getattr(trace, name))
    save_file(arrays, tmp_path / "theirs.safetensors", metadata=metadata)
    assert_same(read_trace(tmp_path / "theirs.safetensors"), trace)


def test_the_example_in_the_document_runs(tmp_path: Path) -> None:
    write_trace(make_trace(), tmp_path / "demo.safetensors")
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert "moeinf" not in example
    shown = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"tiny uses in layer 0: \[[\d, ]+\] of 8\n", shown.stdout)


def test_a_tensor_that_would_not_fit_in_memory_is_refused_unread(tmp_path: Path) -> None:
    """The file is mostly a hole, so it is as long as its header says."""
    tokens = 1 << 38
    shapes = {"sequence_id": 4, "position": 4, "experts": 2, "is_prefill": 1}
    dtypes = {"sequence_id": "I32", "position": "I32", "experts": "I16", "is_prefill": "BOOL"}
    header: dict[str, Any] = {"__metadata__": json.loads(spoiled_header())}
    end = 0
    for name, width in shapes.items():
        shape = [tokens, 1, 1] if name == "experts" else [tokens]
        header[name] = {"dtype": dtypes[name], "shape": shape, "data_offsets": [end, end + tokens * width]}
        end += tokens * width
    text = json.dumps(header).encode()
    with (tmp_path / "t.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    with pytest.raises(
        UnsupportedError, match=r"t\.safetensors: 274877906944 tokens, 1 layers and 1 experts make more"
    ):
        read_trace(tmp_path / "t.safetensors")


def spoiled_header() -> str:
    content = spoiled(lambda header: None)
    return json.dumps(json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"])


def save(kind: str, path: Path) -> None:
    """The same trace in each of the formats that are read."""
    trace = make_trace(tokens=3)
    if kind == "safetensors":
        write_trace(trace, path)
    elif kind == "jsonl":
        write_json_lines(trace, path)
    else:
        with path.open("wb") as stream:  # np.savez would add an ending
            np.savez_compressed(stream, **{name: getattr(trace, name) for name in ARRAYS})


KINDS = pytest.mark.parametrize("kind", ["safetensors", "jsonl", "npz"])


@KINDS
def test_formats_are_told_apart_by_what_is_in_them(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "some.jsonl")
    found = read_trace(tmp_path / "some.jsonl")
    for name in ARRAYS:
        assert np.array_equal(getattr(found, name), getattr(make_trace(tokens=3), name))


@KINDS
def test_a_cut_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"t.{kind}"
    save(kind, path)
    whole = path.read_bytes()
    for length in range(len(whole) - (kind == "jsonl")):  # the last line needs no end
        path.write_bytes(whole[:length])
        with pytest.raises(MoeinfError, match=rf"t\.{kind}"):
            read_trace(path)


@KINDS
def test_no_changed_byte_leads_to_anything_but_an_error_that_says_so(kind: str, tmp_path: Path) -> None:
    chance, path = random.Random(1), tmp_path / f"t.{kind}"
    save(kind, path)
    whole = path.read_bytes()
    said = []
    for position in range(len(whole)):
        for value in (0xFF, ord("9"), chance.randrange(256)):
            path.write_bytes(bytes([*whole[:position], value, *whole[position + 1 :]]))
            try:
                read_trace(path)
            except MoeinfError as error:
                said.append(str(error))
    assert all(str(path) in message for message in said)
    assert len(said) > len(whole)


HEADER = {"format": "moeinf-trace", "version": 1, "model": "m", "architecture": "", "source_repo": ""}
HEADER |= {"source_commit": "", "layer_sizes": [4, 4], "top_k": [2, 1]}
TOKEN = {"sequence": 0, "position": 0, "phase": "decode", "experts": [[0, 3], [2]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"experts": [[0, 3]]}, "line 2: it has no experts for each of 2 layers"),
        ({"experts": [[0, 3], [2, 1]]}, "line 2: layer 1: its experts are not a list of at most 1 numbers"),
        ({"experts": [[0, "3"], [2]]}, "line 2: layer 0: its experts are not a list"),
        ({"experts": [[0, True], [2]]}, "line 2: layer 0: its experts are not a list"),
        ({"experts": [[0, 9], [2]]}, "layer 0: there is no expert 9 among 4"),
        ({"experts": [[0, 0], [2]]}, "layer 0"),
        ({"phase": "dreaming"}, "line 2: its phase is neither prefill nor decode"),
        ({"sequence": -1}, "line 2: its sequence and position are not numbers"),
        ({"mood": 1}, "line 2: no token has 'mood'"),
        ({"weights": [[0.5], [1.0]]}, "line 2: it has not as many weights as experts"),
        ({"weights": [[0.5, 0.5]]}, "line 2: it has no weights for each of 2 layers"),
        ({"weights": [[0.5, None], [1.0]]}, "line 2: layer 0: its weights are not a list"),
        ({"weights": [[0.5, 10**400], [1.0]]}, "line 2: a weight is larger than any float16"),
        ({"weights": [[0.5, -1e300], [1.0]]}, "line 2: a weight is larger than any float16"),
        ({"weights": [[0.5, float("nan")], [1.0]]}, "line 2: it is not JSON (NaN is no number)"),
        ({"experts": [[0, 40000], [2]]}, "line 2: an expert is not a number from 0 on, or -1 for none"),
        ({"experts": [[0, -2], [2]]}, "line 2: an expert is not a number from 0 on, or -1 for none"),
        ({"foreseen": [[0, 9], [2]]}, "foreseen: token 0, layer 0: there is no expert 9 among 4"),
        ({"foreseen": [[0, -2], [2]]}, "line 2: an expert is not a number from 0 on, or -1 for none"),
        ({"foreseen": [[0, 3]]}, "line 2: it has no foreseen for each of 2 layers"),
        ({"experts": None}, "line 2: it has no experts for each of 2 layers"),
        ({"experts": [[0, 3], 2]}, "line 2: layer 1: its experts are not a list"),
        ({"position": 1 << 31}, "line 2: its sequence and position are not numbers"),
        ({"position": True}, "line 2: its sequence and position are not numbers"),
    ],
)
def test_json_lines_are_checked_line_by_line(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(HEADER)}\n{json.dumps({**TOKEN, **changes})}\n", encoding="utf-8")
    if message is None:
        assert read_trace(path).experts.tolist() == [[[0, 3], [2, -1]]]
        return
    with pytest.raises(IntegrityError) as caught:
        read_trace(path)
    assert message in str(caught.value)


def test_json_lines_may_foresee_some_tokens(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [HEADER, TOKEN, {**TOKEN, "position": 4, "foreseen": [[], [2]]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    foreseen = read_trace(path).foreseen
    assert foreseen is not None
    assert foreseen.tolist() == [[[-1, -1], [-1, -1]], [[-1, -1], [2, -1]]]


def test_json_lines_may_leave_places_empty(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [HEADER, {**TOKEN, "experts": [[3], []]}, {**TOKEN, "position": 4, "experts": [[-1, 2], [-1]]}]
    path.write_text("".join(json.dumps(line) + "\r\n" for line in lines), encoding="utf-8")
    assert read_trace(path).experts.tolist() == [[[3, -1], [-1, -1]], [[-1, 2], [-1, -1]]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{**HEADER, "tokens": 2}, TOKEN], "it has 1 tokens, and its first line says 2"),
        ([{**HEADER, "version": 2}, TOKEN], "version 2, this program reads version 1"),
        ([{**HEADER, "version": "1"}, TOKEN], "its version is no number"),
        ([{**HEADER, "model": None}, TOKEN], "it has no text 'model'"),
        ([{**HEADER, "top_k": "[2, 1]"}, TOKEN], "it has no list of numbers 'top_k'"),
        ([{**HEADER, "top_k": [2, True]}, TOKEN], "it has no list of numbers 'top_k'"),
        ([{**HEADER, "top_k": [2, 5]}, TOKEN], "layer 1: no token can ask for 5 of 4 experts"),
        ([HEADER, TOKEN, TOKEN], "token 1: position 0 of sequence 0 comes after position 0"),
        ([HEADER, TOKEN, []], "line 3: it is not an object"),
        ([HEADER, TOKEN, {**TOKEN, "position": 1, "weights": [[0, 1], [1]]}], "line 3: only some tokens have weights"),
        ([HEADER, {**TOKEN, "weights": [[0, 1], [1]]}, {**TOKEN, "position": 1}], "line 3: only some tokens have"),
        ([{"format": "other"}, TOKEN], "is no trace"),
        ([[HEADER], TOKEN], "is no trace"),
    ],
)
def test_json_lines_that_do_not_fit_together_are_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(MoeinfError) as caught:
        read_trace(path)
    assert message in str(caught.value)


def test_a_line_without_an_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefile, "_MAX_LINE_BYTES", 500)
    (tmp_path / "t.jsonl").write_text(json.dumps(HEADER) + "\n" + " " * 1000, encoding="utf-8")
    with pytest.raises(IntegrityError, match="a line is longer than any of a trace: 500 bytes"):
        read_trace(tmp_path / "t.jsonl")


def test_numpy_files_of_others_are_read(tmp_path: Path) -> None:
    experts = np.array([[[0, 3], [2, 1]], [[1, 2], [5, 0]]], np.int64)
    numbers: dict[str, Any] = {"sequence_id": np.array([4, 4]), "position": np.array([0, 1])}
    np.savez(tmp_path / "bare.npz", experts=experts, **numbers)
    bare = read_trace(tmp_path / "bare.npz")
    assert bare.layer_sizes == (6, 6)  # nothing says how many there are, so the largest number does
    assert bare.weights is None
    assert bare.is_prefill.tolist() == [False, False]
    weights, is_prefill = np.full(experts.shape, 0.5, np.float32), np.array([True, False])
    np.savez_compressed(tmp_path / "full.npz", experts=experts, weights=weights, is_prefill=is_prefill, **numbers)
    (tmp_path / "full.json").write_text(json.dumps({"num_experts": 32, "model": "org/full"}), encoding="utf-8")
    full = read_trace(tmp_path / "full.npz")
    assert full.layer_sizes == (32, 32)
    assert full.weights is not None
    assert full.is_prefill.tolist() == [True, False]
    assert np.array_equal(full.experts, experts)


def npz(**changes: Any) -> dict[str, Any]:
    """A sound set of arrays, with changes."""
    experts = np.array([[[0, 3, -1], [2, -1, -1]], [[1, 2, -1], [5, -1, -1]]])
    return {"experts": experts, "sequence_id": np.array([4, 4]), "position": np.array([0, 1]), **changes}


def test_places_that_nobody_uses_are_left_out_of_numpy_files(tmp_path: Path) -> None:
    weights = np.full((2, 2, 3), 0.5)
    np.savez(tmp_path / "t.npz", **npz(weights=weights))
    found = read_trace(tmp_path / "t.npz")
    assert found.identity.top_k == (2, 1)
    assert found.experts.tolist() == [[[0, 3], [2, -1]], [[1, 2], [5, -1]]]
    assert found.weights is not None
    assert found.weights.tolist() == [[[0.5, 0.5], [0.5, 0]]] * 2
    assert found.identity.model == "t"
    assert found.identity.source.repo == ""


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ('{"num_experts": 4}', "token 1, layer 1: there is no expert 5 among 4"),
        ('{"num_experts": "4"}', "it has no list of numbers 'num_experts'"),
        ('{"num_experts": [4, 6, 6]}', "there are 3 layer sizes"),
        ('{"num_layers": 3}', "it has 2 layers, and the .json beside it says 3"),
        ('{"model": 5}', "it has no text 'model'"),
        ('{"num_experts"', "the t.json beside it is not JSON"),
        ("[4]", None),
        ('{"num_experts": [4, 6], "model": "org/m"}', None),
        ("{}", None),
    ],
)
def test_what_is_said_beside_a_numpy_file_must_fit_it(tmp_path: Path, notes: str, message: str | None) -> None:
    np.savez(tmp_path / "t.npz", **npz())
    (tmp_path / "t.json").write_text(notes, encoding="utf-8")
    if message is None:
        assert read_trace(tmp_path / "t.npz").num_tokens == 2
        return
    with pytest.raises(IntegrityError) as caught:
        read_trace(tmp_path / "t.npz")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": np.zeros((2, 0, 2), int)}, "experts has shape"),
        ({"experts": np.full((2, 1, 1), -2)}, "experts has a number that is not between -1 and"),
        ({"sequence_id": np.array([0.0, 0.0])}, "sequence_id is not an array of the right type"),
        ({"sequence_id": np.array([0, 1 << 31])}, "sequence_id has a number that is not between 0 and"),
        ({"position": np.array([-1, 0])}, "position has a number that is not between 0 and"),
        ({"position": np.array([0, 2**64 - 1], np.uint64)}, "position has a number that is not between 0 and"),
        ({"position": np.array([[0, 1]])}, "position has shape"),
        ({"weights": np.float32(0.5)}, "weights has shape"),
        ({"weights": np.zeros((2, 2, 1))}, "weights has shape"),
        ({"weights": np.zeros((2, 2, 3), int)}, "weights is not an array of the right type"),
        ({"weights": np.full((2, 2, 3), 1e30)}, "token 0, layer 0: a weight is not a finite float16"),
        ({"is_prefill": np.array([0, 1])}, "is_prefill is not an array of the right type"),
    ],
)
def test_numbers_in_numpy_files_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "t.npz", **npz(**changes))
    with pytest.raises(IntegrityError, match=r"t\.npz") as caught:
        read_trace(tmp_path / "t.npz")
    assert message in str(caught.value)


def test_a_numpy_file_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefile, "_MAX_NPZ_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "t.npz", **npz(more=np.zeros(1 << 20, np.uint8)))
    assert (tmp_path / "t.npz").stat().st_size < 1 << 14
    with pytest.raises(UnsupportedError, match="bytes of memory"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"experts": np.zeros((1, 1, 1), np.int16)},
        {"experts": np.zeros((1, 1), np.int16), "sequence_id": np.zeros(1, int), "position": np.zeros(1, int)},
        {"experts": np.zeros((1, 1, 1)), "sequence_id": np.zeros(1, int), "position": np.zeros(1, int)},
        {"experts": np.full((1, 1, 1), 1 << 20), "sequence_id": np.zeros(1, int), "position": np.zeros(1, int)},
        {"experts": np.zeros((2, 1, 1), int), "sequence_id": np.zeros(1, int), "position": np.zeros(1, int)},
    ],
)
def test_numpy_files_that_are_no_traces_are_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(MoeinfError, match=r"t\.npz"):
        read_trace(tmp_path / "t.npz")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    objects = np.array([[[{}]]], object)
    np.savez(tmp_path / "t.npz", experts=objects, sequence_id=np.zeros(1, int), position=np.zeros(1, int))
    with pytest.raises(MoeinfError, match=r"t\.npz"):
        read_trace(tmp_path / "t.npz")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"[1, 2]\n"])
def test_other_files_are_refused_with_a_hint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(MoeinfError) as caught:
        read_trace(tmp_path / "notes.txt")
    assert "notes.txt" in str(caught.value)
    with pytest.raises(UsageError, match=r"gone\.safetensors"):
        read_trace(tmp_path / "gone.safetensors")
    with pytest.raises(UsageError):
        read_trace(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"hello\n"])
def test_a_trace_of_another_program_is_no_trace(tmp_path: Path, content: bytes) -> None:
    save_file({"experts": np.zeros(3, np.int16)}, tmp_path / "w.safetensors", metadata={"format": "pt", "version": "x"})
    np.savez(tmp_path / "w.npz", somewhat=np.zeros(3))
    (tmp_path / "w.bin").write_bytes(content)
    for name in ("w.safetensors", "w.npz", "w.bin"):
        with pytest.raises(UsageError, match="is no trace") as caught:
            read_trace(tmp_path / name)
        assert caught.value.hint


def survives(write: Callable[..., None], old: Any, new: Any, path: Path, disk: FailingDisk | PowerLossDisk) -> bool:
    """Whether writing `new` over `old` meets no failure; if it does, one of the two is there, whole."""
    try:
        write(new, path, disk=disk)
    except MoeinfError:
        assert disk.has_failed
    else:
        return True
    if path.exists():
        assert read_trace(path).num_tokens in {new.num_tokens, new.num_tokens if old is None else old.num_tokens}
    else:
        assert old is None
    return False


@pytest.mark.parametrize("old", [None, make_trace(seed=1)], ids=["new", "replaced"])
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("write", [write_trace, write_json_lines])
def test_whatever_operation_fails_a_write_leaves_the_old_file_or_the_new_one(
    write: Callable[..., None], for_ever: bool, old: Any, tmp_path: Path
) -> None:
    new = make_trace(tokens=9, seed=2)
    for number in itertools.count(1):
        path, disk = tmp_path / f"{number}" / "t.trace", FailingDisk(number, for_ever=for_ever)
        if old is not None:
            write_trace(old, path)
        if survives(write, old, new, path, disk):
            break
        others = [found for found in path.parent.glob("*") if found != path]
        assert not others or for_ever
        write(new, path)
        assert_same(read_trace(path), new)
    assert number > 5


@pytest.mark.parametrize("old", [None, make_trace(seed=1)], ids=["new", "replaced"])
def test_whenever_the_power_fails_the_file_is_whole(old: Any, tmp_path: Path) -> None:
    new = make_trace(tokens=9, seed=2)
    for number in itertools.count(1):
        path, disk = tmp_path / f"{number}" / "t.trace", PowerLossDisk(number)
        if old is not None:
            write_trace(old, path)
        if survives(write_trace, old, new, path, disk):
            break
    assert number > 5


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, CapacityError), (errno.EROFS, UsageError), (errno.EACCES, UsageError)]
)
def test_a_place_without_room_or_access_is_said(code: int, kind: type[MoeinfError], tmp_path: Path) -> None:
    with pytest.raises(kind) as caught:
        write_trace(make_trace(), tmp_path / "t.trace", disk=FailingDisk(1, code))
    assert caught.value.hint == "save it in a folder that you may write to and that has room"
    assert list(tmp_path.iterdir()) == []
