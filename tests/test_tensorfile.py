"""The strict reader of safetensors files, against the reference implementation and against every kind of bad file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeinf.errors import IntegrityError
from moeinf.tensorfile import MAX_HEADER_BYTES, TensorFile, encode_header

TENSORS = {
    "bfloat": torch.arange(24, dtype=torch.bfloat16).reshape(4, 6),
    "byte": torch.arange(5, dtype=torch.uint8),
    "empty": torch.empty((0, 3), dtype=torch.float32),
    "float8": torch.arange(8, dtype=torch.float32).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(7, dtype=torch.int64),
}
SOUND = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [1], "data_offsets": [8, 9]},
}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write_file(path: Path, header: Any, data: bytes = bytes(9)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def changed(**fields: Any) -> dict[str, Any]:
    return {**SOUND, "a": {**SOUND["a"], **fields}}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "reference.safetensors", metadata={"format": "pt"})
    return tmp_path / "reference.safetensors"


def test_reads_what_the_reference_implementation_writes(reference: Path) -> None:
    with TensorFile.open(reference) as file:
        assert file.metadata == {"format": "pt"}
        assert {name: entry.shape for name, entry in file.entries.items()} == {
            name: tuple(tensor.shape) for name, tensor in TENSORS.items()
        }
        for name, tensor in TENSORS.items():
            assert file.read(name) == raw_bytes(tensor)
            assert file.entries[name].nbytes == tensor.nbytes


def test_reads_rows(reference: Path) -> None:
    with TensorFile.open(reference) as file:
        assert file.read("bfloat", 1, 3) == raw_bytes(TENSORS["bfloat"][1:3])
        assert file.read("bfloat", 2) == raw_bytes(TENSORS["bfloat"][2:])
        assert file.read("bfloat", 2, 2) == b""
        for begin, end in ((0, 5), (3, 2), (-1, 2)):
            with pytest.raises(ValueError, match="has 4 rows"):
                file.read("bfloat", begin, end)


def test_fills_a_part_of_a_buffer_from_anywhere(reference: Path) -> None:
    buffer = bytearray(10)
    with TensorFile.open(reference) as file:
        file.pread_into(memoryview(buffer)[2:8], file.entries["bfloat"].begin + 2)
    assert buffer == b"\0\0" + raw_bytes(TENSORS["bfloat"])[2:8] + b"\0\0"


def test_a_closed_file_is_not_read(reference: Path) -> None:
    file = TensorFile.open(reference)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read("byte")


def test_a_file_that_shrinks_while_it_is_open_is_an_integrity_error(reference: Path) -> None:
    with TensorFile.open(reference) as file:
        reference.write_bytes(reference.read_bytes()[:-4])
        last = max(file.entries.values(), key=lambda entry: entry.end)
        with pytest.raises(IntegrityError, match=r"reference\.safetensors.*too early"):
            file.read(last.name)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_an_encoded_header_starts_a_file_that_the_reference_implementation_reads(
    tmp_path: Path, alignment: int
) -> None:
    described = [("x", "BF16", (4, 6)), ("y", "U8", (5,))]
    header = encode_header(described, {"format": "pt"}, alignment)
    assert len(header) % alignment == 0
    path = tmp_path / "made.safetensors"
    path.write_bytes(header + raw_bytes(TENSORS["bfloat"]) + raw_bytes(TENSORS["byte"]))
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), TENSORS["bfloat"])
        assert torch.equal(file.get_tensor("y"), TENSORS["byte"])
    with TensorFile.open(path) as own:
        assert own.entries["x"].begin == len(header)


def test_a_header_has_each_name_once() -> None:
    with pytest.raises(ValueError, match="two tensors"):
        encode_header([("x", "U8", (1,)), ("x", "U8", (1,))])


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b'{"a\xff": 1}', "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', "not JSON"),
        ({**SOUND, "__metadata__": {"format": 1}}, "metadata"),
        ({**SOUND, "__metadata__": []}, "metadata"),
        ({**SOUND, "a": 1}, "not described"),
        ({**SOUND, "a": {"dtype": "F32", "shape": [2]}}, "not described"),
        (changed(more=1), "not described"),
        (changed(data_offsets=[0]), "not described"),
        (changed(dtype="F31"), "unknown dtype 'F31'"),
        (changed(shape=[-2]), "no possible shape"),
        (changed(shape=[True, 2]), "no possible shape"),
        (changed(shape=[2.0]), "no possible shape"),
        (changed(shape=[1 << 60, 0]), "no possible shape"),
        (changed(shape=[1] * 40), "no possible shape"),
        (changed(shape=[3]), "do not fit its shape"),
        (changed(data_offsets=[0, 9]), "do not fit its shape"),
        (changed(data_offsets=[8, 0]), "do not fit its shape"),
        (changed(data_offsets=[-8, 0]), "do not fit its shape"),
        (changed(shape=[1], data_offsets=[0, 4]), "hole or an overlap"),
        (changed(data_offsets=[1, 9]), "hole or an overlap"),
        (changed(data_offsets=[9, 17]), "hole or an overlap"),
        ({"a": SOUND["a"]}, "its tensors end"),
        ({}, "its tensors end"),
    ],
)
def test_a_header_that_is_not_sound_is_refused(tmp_path: Path, header: Any, complaint: str) -> None:
    path = write_file(tmp_path / "bad.safetensors", header)
    with pytest.raises(IntegrityError, match=complaint) as caught:
        TensorFile.open(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (lambda: b"", "too early"),
        (lambda: b"\0" * 7, "too early"),
        (lambda: struct.pack("<Q", 100) + b"{}", "inside its header"),
        (lambda: struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "more than any file needs"),
        (lambda: struct.pack("<Q", 2**64 - 1) + b"{}", "more than any file needs"),
    ],
)
def test_a_file_without_a_whole_header_is_refused(tmp_path: Path, content: Callable[[], bytes], complaint: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content())
    with pytest.raises(IntegrityError, match=complaint):
        TensorFile.open(path)


def test_what_is_no_file_is_an_integrity_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(IntegrityError) as caught:
            TensorFile.open(path)
        assert str(path) in str(caught.value)


def test_a_file_cut_anywhere_or_made_longer_is_refused(reference: Path, tmp_path: Path) -> None:
    whole = reference.read_bytes()
    path = tmp_path / "cut.safetensors"
    for content in [whole[:length] for length in range(len(whole))] + [whole + b"\0"]:
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            TensorFile.open(path)


def test_no_changed_byte_of_a_header_leads_to_anything_but_an_integrity_error(reference: Path, tmp_path: Path) -> None:
    whole = bytearray(reference.read_bytes())
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    path = tmp_path / "changed.safetensors"
    refused = 0
    for position in range(header_end):
        for value in (ord("9"), 0xFF):
            path.write_bytes(bytes([*whole[:position], value, *whole[position + 1 :]]))
            try:
                with TensorFile.open(path) as file:
                    assert all(len(file.read(name)) == entry.nbytes for name, entry in file.entries.items())
            except IntegrityError:
                refused += 1
    assert refused > header_end // 2
