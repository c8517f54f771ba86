"""Trace files: what is written is read again, and what is damaged or no trace is refused, saying why."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults import FailingDisk
from moeinf.errors import IntegrityError, MoeinfError, UnsupportedError, UsageError
from moeinf.tracefile import read_trace, write_json_lines, write_trace
from traces import assert_same, make_trace, random_trace


@pytest.mark.parametrize("write", [write_trace, write_json_lines])
@pytest.mark.parametrize("seed", range(12))
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


@pytest.mark.parametrize("keep", [0, 3, 40, 200, -1])
def test_a_cut_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.safetensors"
    write_trace(make_trace(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MoeinfError, match=r"t\.safetensors"):
        read_trace(path)


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


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """The N-th operation on the disk fails, N = 1, 2, 3 … until the write succeeds."""
    path = tmp_path / "t.safetensors"
    old, new = make_trace(seed=1), make_trace(tokens=9, seed=2)
    write_trace(old, path)
    for number in range(1, 100):
        try:
            write_trace(new, path, disk=FailingDisk(number))
        except (MoeinfError, OSError):
            assert read_trace(path).num_tokens in (5, 9)
        else:
            break
    assert 1 < number < 99
    assert_same(read_trace(path), new)
    assert [found.name for found in tmp_path.iterdir()] == ["t.safetensors"]
