"""The manifest: what it says of a model, and that only a whole one is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeinf.errors import IntegrityError, UnsupportedError
from moeinf.manifest import (
    DENSE_SCHEMA,
    DTYPE_BYTES,
    EXPERT_ALIGNMENT,
    QUANTIZED_SCHEMA,
    SCHEMA,
    ExpertLayout,
    FileRecord,
    Manifest,
    MoeLayer,
    Quantization,
    Source,
    TensorSpec,
    expert_path,
)
from moeinf.tensorfile import encode_header

SPECIFICATION = Path(__file__).parents[1] / "docs" / "store-format.md"
MANIFEST = Manifest(
    source=Source("org/tiny", "0" * 40),
    architecture="TinyForCausalLM",
    model_type="tiny",
    dtype="bfloat16",
    precision="mxfp4 expanded to bfloat16",
    layers=(MoeLayer("model.layers.1.mlp.experts", 8, 2), MoeLayer("model.layers.3.mlp.experts", 4, 1)),
    layout=ExpertLayout(4096, (TensorSpec("gate_up_proj", "BF16", (32, 16), 0), TensorSpec("bias", "F32", (7,), 1024))),
    dense_files=("dense.safetensors",),
    dense_bytes=1000,
    kv_token_bytes=256,
    kv_fixed_bytes=64,
    max_context=2048,
    files={"config.json": FileRecord(10, "a" * 64), "dense.safetensors": FileRecord(1100, "b" * 64)},
)


QUANTIZED = replace(
    MANIFEST,
    precision="int4 experts (groups of 16), from bfloat16",
    layout=ExpertLayout(
        4096,
        (TensorSpec("up_proj_scales", "U8", (6, 5), 0), TensorSpec("up_proj", "U8", (6, 17), 30)),
        Quantization("int4", 16, "BF16", {"up_proj": 33}),
    ),
)


PACKED = replace(
    MANIFEST,
    precision="bfloat16, packed without loss",
    layout=ExpertLayout(
        4096,
        (TensorSpec("up_proj", "U8", (2, 3, 192), 0), TensorSpec("up_proj_uppers", "U32", (10,), 1152)),
        Quantization("lossless", 16, "BF16", {"up_proj": 24}),
    ),
    packed_dense={"lm_head.weight": (32, 8), "model.layers.0.self_attn.q_proj.weight": (16, 8)},
)


def edited(change: Callable[[dict[str, Any]], object], manifest: Manifest = MANIFEST) -> str:
    raw = json.loads(manifest.to_json())
    change(raw)
    return json.dumps(raw)


def test_what_is_written_is_read_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    from_folder = replace(MANIFEST, source=Source("/models/größe"))
    assert Manifest.from_json(from_folder.to_json()) == from_folder


def test_quantised_experts_are_a_schema_of_their_own() -> None:
    """A program that knows schema 1 alone must not take bytes for weights; and one of its time reads what is plain."""
    assert Manifest.from_json(QUANTIZED.to_json()) == QUANTIZED
    assert json.loads(QUANTIZED.to_json())["schema"] == QUANTIZED_SCHEMA
    plain = json.loads(MANIFEST.to_json())
    assert plain["schema"] == SCHEMA
    assert plain["layout"].keys() == {"data_offset", "tensors"}


def test_packed_dense_weights_are_a_schema_of_their_own() -> None:
    assert Manifest.from_json(PACKED.to_json()) == PACKED
    assert json.loads(PACKED.to_json())["schema"] == DENSE_SCHEMA
    assert Manifest.from_json(replace(PACKED, packed_dense={}).to_json()).schema == QUANTIZED_SCHEMA
    beside_numbers = replace(QUANTIZED, packed_dense=PACKED.packed_dense)
    assert Manifest.from_json(beside_numbers.to_json()) == beside_numbers
    assert beside_numbers.schema == DENSE_SCHEMA
    more = 2 * (32 + 16) * 8 - (3 * 192 + 4 * (4 + 3 + 1 + 4 + 2))
    assert PACKED.unpacked == replace(PACKED, dense_bytes=1000 + more, packed_dense={})
    assert MANIFEST.unpacked == MANIFEST


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(schema=QUANTIZED_SCHEMA),
        lambda raw: raw.pop("packed_dense"),
        lambda raw: raw.update(packed_dense={}),
        lambda raw: raw.update(packed_dense=["lm_head.weight"]),
        lambda raw: raw.update(dense_bytes=400),
        lambda raw: raw["layout"].pop("quantization"),
        lambda raw: raw["packed_dense"].update({"lm_head.weight": [32]}),
        lambda raw: raw["packed_dense"].update({"lm_head.weight": [24, 8]}),
        lambda raw: raw["packed_dense"].update({"lm_head.weight": [16, 12]}),
        lambda raw: raw["packed_dense"].update({"lm_head.weight": [0, 8]}),
        lambda raw: raw["packed_dense"].update({"lm_head.weight": [-16, 8]}),
        lambda raw: raw["packed_dense"].update({"lm_head.weight": [16, 1 << 16]}),
        lambda raw: raw["packed_dense"].update({"lm_head.weight": [16.0, 8]}),
        lambda raw: raw["packed_dense"].update({"": [16, 8]}),
    ],
)
def test_packed_dense_weights_that_cannot_be_are_damage(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(IntegrityError, match=r"moeinf\.json is damaged"):
        Manifest.from_json(edited(change, PACKED))


@pytest.mark.parametrize(("key", "value"), [("kind", "int3"), ("group", 48), ("version", 2)])
def test_another_form_of_experts_is_not_guessed_at(key: str, value: object) -> None:
    other = edited(lambda raw: raw["layout"]["quantization"].update({key: value}), QUANTIZED)
    with pytest.raises(UnsupportedError, match=f"its experts are .*{value}.*, which this program does not know"):
        Manifest.from_json(other)


def test_the_former_int4_is_refused_with_what_to_do() -> None:
    former = edited(lambda raw: raw["layout"]["quantization"].update(group=32), QUANTIZED)
    with pytest.raises(
        UnsupportedError, match=r"int4 in groups of 32, a form that .* does not read any more"
    ) as caught:
        Manifest.from_json(former)
    assert "quantise or pull the model again" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(schema=SCHEMA),
        lambda raw: raw["layout"].update(quantization=None),
        lambda raw: raw["layout"]["quantization"].update(widths={"up_proj": 35}),
        lambda raw: raw["layout"]["quantization"].update(widths={"down_proj": 33}),
        lambda raw: raw["layout"]["tensors"][0].update(dtype="BF16"),
        lambda raw: raw["layout"]["tensors"][0].update(shape=[6, 3]),
        lambda raw: raw["layout"]["tensors"].pop(0),
    ],
)
def test_numbers_that_do_not_fit_their_form_are_damage(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(IntegrityError, match=r"moeinf\.json is damaged"):
        Manifest.from_json(edited(change, QUANTIZED))


def test_the_same_manifest_is_the_same_text() -> None:
    other_order = replace(MANIFEST, files=dict(reversed(MANIFEST.files.items())))
    assert other_order.to_json() == MANIFEST.to_json()


def test_the_numbers_follow_from_the_fields() -> None:
    assert [tensor.nbytes for tensor in MANIFEST.layout.tensors] == [1024, 28]
    assert MANIFEST.layout.nbytes == 1052
    assert MANIFEST.layout.file_bytes == 5148
    assert MANIFEST.num_experts == 12
    assert MANIFEST.token_experts == 3
    assert MANIFEST.experts_bytes == 12 * 1052
    assert MANIFEST.stored_bytes == 1110


def test_experts_lie_where_the_format_says() -> None:
    assert expert_path(3, 17) == "experts/L003/E017.safetensors"
    assert expert_path(0, 1234) == "experts/L000/E1234.safetensors"


def test_a_dtype_has_the_bytes_that_its_name_says() -> None:
    bits = {name: int("".join(filter(str.isdigit, name.split("_")[0])) or 8) for name in DTYPE_BYTES}
    assert {name: size * 8 for name, size in DTYPE_BYTES.items()} == bits


def test_the_specification_names_every_field() -> None:
    def names(prefix: str, value: object) -> set[str]:
        if isinstance(value, dict) and prefix not in ("files", "packed_dense", "layout.quantization.widths"):
            return {name for key in value for name in names(f"{prefix}.{key}".lstrip("."), value[key])}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return names(f"{prefix}[]", value[0])
        return {f"{prefix}[]" if isinstance(value, list) and not prefix.endswith("shape") else prefix}

    text = SPECIFICATION.read_text(encoding="utf-8")
    missing = {name for name in names("", json.loads(PACKED.to_json())) if f"| `{name}` |" not in text}
    assert missing == set()


def test_the_bytes_in_the_specification_are_those_that_are_written() -> None:
    tensors = [("gate_up_proj", "BF16", (32, 16)), ("down_proj", "BF16", (16, 16))]
    header = encode_header(tensors, alignment=EXPERT_ALIGNMENT)
    text = SPECIFICATION.read_text(encoding="utf-8")
    lines = [line.split("|")[0].split() for line in text.splitlines() if "  |" in line]
    dump = {int(line[0], 16): bytes.fromhex("".join(line[1:])) for line in lines}
    assert sorted(dump) == list(range(0, 0xB0, 16))
    assert header.startswith(b"".join(dump[offset] for offset in sorted(dump)))
    assert header[0xB0:].strip() == b""
    assert len(header) == 4096


def test_a_newer_schema_is_not_guessed_at() -> None:
    newer = edited(lambda raw: raw.update(schema=DENSE_SCHEMA + 1, something_new=1))
    with pytest.raises(UnsupportedError, match=f"schema {DENSE_SCHEMA + 1}") as caught:
        Manifest.from_json(newer)
    assert "update moeinf" in (caught.value.hint or "")


def put(value: Any, *keys: str | int) -> Callable[[dict[str, Any]], None]:
    """A change that puts `value` where the keys lead."""

    def change(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


DTYPES = ", ".join(DTYPE_BYTES)
NO_NUMBERS = {"null": None, "true": True, '"x"': "x", "1.0": 1.0, "NaN": math.nan, "Infinity": math.inf, "a list": [1]}
NUMBERS: list[tuple[tuple[str | int, ...], str, int]] = [
    (("files", "config.json", "size"), 'files["config.json"].size', 0),
    (("layers", 1, "num_experts"), "layers[1].num_experts", 1),
    (("layers", 0, "top_k"), "layers[0].top_k", 1),
    (("layout", "data_offset"), "layout.data_offset", 0),
    (("layout", "tensors", 1, "shape", 0), "layout.tensors[1].shape[0]", 1),
    (("layout", "tensors", 0, "offset"), "layout.tensors[0].offset", 0),
    (("layout", "quantization", "group"), "layout.quantization.group", 1),
    (("layout", "quantization", "version"), "layout.quantization.version", 1),
    (("layout", "quantization", "widths", "up_proj"), 'layout.quantization.widths["up_proj"]', 1),
    (("packed_dense", "lm_head.weight", 0), 'packed_dense["lm_head.weight"][0]', 1),
    (("dense_bytes",), "dense_bytes", 0),
    (("kv_token_bytes",), "kv_token_bytes", 0),
    (("kv_fixed_bytes",), "kv_fixed_bytes", 0),
    (("max_context",), "max_context", 1),
]


@pytest.mark.parametrize(("keys", "field", "least"), NUMBERS, ids=[field for _, field, _ in NUMBERS])
def test_a_number_is_whole_and_in_its_bounds(keys: tuple[str | int, ...], field: str, least: int) -> None:
    for shown, value in NO_NUMBERS.items():
        message = f"moeinf.json is damaged: {field} is {shown}, not a whole number"
        with pytest.raises(IntegrityError, match=f"^{re.escape(message)}$"):
            Manifest.from_json(edited(put(value, *keys), PACKED))
    for value in (-1, least - 1, 1 << 63):
        message = f"moeinf.json is damaged: {field} is {value}, not from {least} to {(1 << 63) - 1}"
        with pytest.raises(IntegrityError, match=f"^{re.escape(message)}$"):
            Manifest.from_json(edited(put(value, *keys), PACKED))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put(None, "schema"), "schema is null, not a whole number"),
        (put(True, "schema"), "schema is true, not a whole number"),
        (put(-1, "schema"), f"schema is -1, not from 1 to {(1 << 63) - 1}"),
        (put(None, "architecture"), "architecture is null, not text"),
        (put("float8", "dtype"), 'dtype is "float8", not one of bfloat16, float16, float32'),
        (put(7, "dtype"), "dtype is 7, not text"),
        (put("org/tiny", "source"), 'source is "org/tiny", not an object'),
        (put(None, "source", "repo"), "source.repo is null, not text"),
        (put(7, "source", "commit"), "source.commit is 7, not text"),
        (put("y" * 99, "files"), f'files is "{"y" * 39}…, not an object'),
        (put([], "files", "x"), 'files["x"] is a list, not an object'),
        (put({"size": 1}, "files", "x"), 'files["x"].sha256 is missing'),
        (put(None, "files", "dense.safetensors", "sha256"), 'files["dense.safetensors"].sha256 is null, not text'),
        (put(None, "dense_files"), "dense_files is null, not a list"),
        (put([None], "dense_files"), "dense_files[0] is null, not text"),
        (put([], "layers"), "layers is empty"),
        (put({}, "layers"), "layers is an object, not a list"),
        (put({}, "layers", 1), "layers[1].module is missing"),
        (put(9, "layers", 0, "top_k"), "layers[0].top_k is 9, and the layer has 8 experts"),
        (put([], "layout", "tensors"), "layout.tensors is empty"),
        (put(None, "layout", "tensors", 0, "name"), "layout.tensors[0].name is null, not text"),
        (put("x", "layout", "tensors", 0, "dtype"), f'layout.tensors[0].dtype is "x", not one of {DTYPES}'),
        (put(32, "layout", "tensors", 0, "shape"), "layout.tensors[0].shape is 32, not a list"),
        (
            put(1000, "layout", "tensors", 1, "offset"),
            "layout.tensors[1].offset is 1000, and what comes before ends at 1024",
        ),
        (put(7, "layout", "quantization"), "layout.quantization is 7, not an object"),
        (put({}, "layout", "quantization"), "layout.quantization.kind is missing"),
        (put(1, "layout", "x"), "layout.x is no field that this program knows"),
        (put(1, "packed_dense"), "packed_dense is 1, not an object"),
        (put({}, "packed_dense"), "schema 1 does not fit its dense part"),
    ],
)
def test_damage_is_told_by_its_field(change: Callable[[dict[str, Any]], object], told: str) -> None:
    with pytest.raises(IntegrityError, match=f"^moeinf\\.json is damaged: {re.escape(told)}$"):
        Manifest.from_json(edited(change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("x", "dtype"), f'layout.quantization.dtype is "x", not one of {DTYPES}'),
        (put(None, "kind"), "layout.quantization.kind is null, not text"),
        (put([33], "widths"), "layout.quantization.widths is a list, not an object"),
        (put({"down_proj": 33}, "widths"), "layout.tensors has no rows of down_proj"),
    ],
)
def test_damage_to_packed_experts_is_told_by_its_field(change: Callable[[dict[str, Any]], None], told: str) -> None:
    with pytest.raises(IntegrityError, match=f"^moeinf\\.json is damaged: {re.escape(told)}$"):
        Manifest.from_json(edited(lambda raw: change(raw["layout"]["quantization"]), QUANTIZED))


@pytest.mark.parametrize("manifest", [QUANTIZED, PACKED], ids=["numbers", "lossless"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_packed_tensor_without_rows_is_damage(manifest: Manifest, index: int) -> None:
    name = manifest.layout.tensors[index].name
    with pytest.raises(IntegrityError, match=f"layout.tensors has no rows of {name}$"):
        Manifest.from_json(edited(put([], "layout", "tensors", index, "shape"), manifest))


@pytest.mark.parametrize("sides", [[16], [16, 8, 8]])
def test_packed_dense_weights_have_two_sides(sides: list[int]) -> None:
    told = rf'packed_dense\["lm_head.weight"\] has {len(sides)} entries, not 2$'
    with pytest.raises(IntegrityError, match=told):
        Manifest.from_json(edited(put(sides, "packed_dense", "lm_head.weight"), PACKED))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is no JSON: Expecting value: line 1 column 1 (char 0)"),
        ("null", "it is null, not an object"),
        ("[]", "it is a list, not an object"),
        ("{}", "schema is missing"),
        ('{"schema": 1}', "source is missing"),
        ("[" * 100_000, "it has a number that is too long, or lists too deep, to be read"),
        ('{"schema": ' + "9" * 5000 + "}", "it has a number that is too long, or lists too deep, to be read"),
    ],
    ids=["empty", "null", "list", "object", "schema", "deep", "long"],
)
def test_what_is_no_manifest_at_all_is_told_in_plain_words(text: str, told: str) -> None:
    with pytest.raises(IntegrityError, match=f"^moeinf\\.json is damaged: {re.escape(told)}$"):
        Manifest.from_json(text)


def test_what_is_null_may_be_absent() -> None:
    from_folder = replace(MANIFEST, source=Source("/models/x"))
    assert Manifest.from_json(edited(lambda raw: raw["source"].pop("commit"), from_folder)) == from_folder
    assert Manifest.from_json(edited(put(None, "layout", "quantization"), from_folder)) == from_folder


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        MANIFEST.to_json()[:-20],
        edited(lambda raw: raw.pop("layers")),
        edited(lambda raw: raw.pop("schema")),
        edited(lambda raw: raw.update(layers=None)),
        edited(lambda raw: raw.update(layers=[{"module": "x"}])),
        edited(lambda raw: raw.update(files=[])),
        edited(lambda raw: raw["files"].update(x={"size": 1})),
        edited(lambda raw: raw["layout"].pop("data_offset")),
        edited(lambda raw: raw["layout"]["tensors"][0].pop("shape")),
        edited(lambda raw: raw.update(source="org/tiny")),
        edited(lambda raw: raw.update(unknown=1)),
    ],
)
def test_what_is_no_manifest_is_damaged(text: str) -> None:
    with pytest.raises(IntegrityError, match=r"moeinf\.json is damaged"):
        Manifest.from_json(text)
