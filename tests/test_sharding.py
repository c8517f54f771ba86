"""The sharder against transformers' own loading: every expert and every dense tensor, bit for bit, in every family."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import dot_natural_key

from families import FAMILIES, make_checkpoint
from moeinf.checkpoint import Checkpoint
from moeinf.conversion import Plan, plan_conversion
from moeinf.errors import IntegrityError, UnsupportedError
from moeinf.manifest import expert_path
from moeinf.sharding import DENSE_NAME, Sharder
from moeinf.tensorfile import TensorFile, encode_header
from packing import edit, edit_config, pack_mxfp4

Bytes = bytes | bytearray | memoryview
BLOCK = 8
MANY_SHARDS = ("deepseek_v3", "granitemoehybrid", "qwen3_moe")


class FolderSink:
    """A sink that keeps files in a folder and what is done in memory. It fails after `patience` writes, half-way."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: set[str] = set()
        self.written: list[str] = []
        self.tensors: set[str] = set()
        self.patience = sys.maxsize

    def is_done(self, path: str) -> bool:
        return path in self.done

    def write(self, path: str, chunks: Iterable[Bytes]) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            for chunk in chunks:
                self.tire()
                file.write(chunk)
        self.written.append(path)
        self.done.add(path)

    def tire(self) -> None:
        self.patience -= 1
        if self.patience < 0:
            raise InterruptedError

    def dense(self, path: str, header: bytes, size: int) -> FolderWriter:
        return FolderWriter(self, path, header, size)


class FolderWriter:
    def __init__(self, sink: FolderSink, path: str, header: bytes, size: int) -> None:
        self.sink = sink
        self.path = path
        with (sink.root / path).open("ab") as file:
            file.truncate(size)
        self.write_at(0, header)

    def is_done(self, tensor: str) -> bool:
        return tensor in self.sink.tensors

    def write_at(self, offset: int, data: Bytes) -> None:
        self.sink.tire()
        with (self.sink.root / self.path).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def mark_done(self, tensor: str) -> None:
        assert tensor not in self.sink.tensors
        self.sink.tensors.add(tensor)
        self.sink.written.append(tensor)

    def close(self) -> None:
        self.sink.done.add(self.path)


def shard(folder: Path, out: Path, dtype: str = "auto", *, sink: FolderSink | None = None) -> Plan:
    checkpoint = Checkpoint.from_folder(folder)
    plan = plan_conversion(checkpoint, dtype)
    out.mkdir(exist_ok=True)
    with Sharder(plan, sink or FolderSink(out)) as sharder:
        for name in checkpoint.weight_files:
            sharder.add_file(folder / name)
        sharder.finish()
    return plan


def stored_tensors(plan: Plan, out: Path) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(parameter, expert or None, tensor), as any reader of safetensors finds them."""
    for name, tensor in load_file(out / DENSE_NAME).items():
        yield name, None, tensor
    for layer, described in enumerate(plan.layers):
        for expert in range(described.num_experts):
            path = out / expert_path(layer, expert)
            assert path.stat().st_size == plan.layout.file_bytes
            for name, tensor in load_file(path).items():
                yield f"{described.module}.{name}", expert, tensor


def check_against_transformers(folder: Path, out: Path, plan: Plan, dtype: str = "auto") -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = model.state_dict()
    found = set()
    for name, expert, tensor in stored_tensors(plan, out):
        right = expected[name] if expert is None else expected[name][expert]
        assert (tensor.dtype, tensor.shape) == (right.dtype, right.shape), (name, expert)
        assert torch.equal(tensor, right), (name, expert)
        found.add(name)
    tied = model.all_tied_weights_keys
    assert {name for name in expected if tied.get(name, name) not in found and name not in found} == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_stored_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "store"
    make_checkpoint(family, folder, max_shard_size="60KB" if family in MANY_SHARDS else "5GB")
    plan = shard(folder, out)
    assert len(plan.dense) == len(load_file(out / DENSE_NAME))
    check_against_transformers(folder, out, plan)


def test_experts_from_the_tenth_on_have_their_numbers(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "store"
    make_checkpoint("olmoe", folder, num_experts=12)
    plan = shard(folder, out)
    assert plan.layers[0].num_experts == 12
    check_against_transformers(folder, out, plan)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("family", ["bailing_hybrid", "deepseek_v4", "gpt_oss", "mixtral", "zaya"])
def test_another_dtype_is_what_transformers_makes_of_it(family: str, dtype: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "store"
    make_checkpoint(family, folder)
    plan = shard(folder, out, dtype)
    assert (plan.dtype, plan.precision) == (dtype, f"bfloat16 converted to {dtype}")
    check_against_transformers(folder, out, plan, dtype)


def test_files_are_aligned_and_sound(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v4", tmp_path / "model")  # float32 and bfloat16 beside each other
    plan = shard(tmp_path / "model", tmp_path / "store")
    for path in (DENSE_NAME, expert_path(0, 0)):
        with TensorFile.open(tmp_path / "store" / path) as file:
            assert min(entry.begin for entry in file.entries.values()) % 4096 == 0
            for entry in file.entries.values():
                assert entry.begin % (entry.nbytes // torch.Size(entry.shape).numel()) == 0
    assert plan.layout.data_offset == 4096
    assert [spec.offset for spec in plan.layout.tensors] == [0, plan.layout.tensors[0].nbytes]


# Packed weights


def to_float8_blocks(tensors: dict[str, torch.Tensor], rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The weights of linear layers as DeepSeek-V3 releases them: float8 values and one float32 scale per block."""
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("proj.weight") or "_proj_" in name:
            height, width = tensor.shape
            grid = torch.zeros(-(-height // rows) * rows, -(-width // columns) * columns)
            grid[:height, :width] = tensor.float()
            blocks = grid.reshape(grid.shape[0] // rows, rows, grid.shape[1] // columns, columns)
            scales = blocks.abs().amax(dim=(1, 3)) / 448
            values = (blocks / scales[:, None, :, None]).reshape(grid.shape)[:height, :width]
            packed |= {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
        else:
            packed[name] = tensor
    return packed


def from_float8_blocks(values: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: values.shape[0], : values.shape[1]]
    return (values.float() * spread).to(torch.bfloat16)


def check_expanded(plan: Plan, out: Path, tensors: dict[str, torch.Tensor], rows: int, columns: int) -> None:
    """Against a plain reading of the format."""

    def whole(name: str) -> torch.Tensor:
        scales = tensors.get(f"{name}_scale_inv")
        return tensors[name] if scales is None else from_float8_blocks(tensors[name], scales, rows, columns)

    for name, expert, tensor in stored_tensors(plan, out):
        module = name.rpartition(".")[0]
        if expert is None:
            expected = whole(name)
        elif name.endswith("gate_up_proj"):
            expected = torch.cat([whole(f"{module}.{expert}.{part}.weight") for part in ("gate_proj", "up_proj")])
        else:
            expected = whole(f"{module}.{expert}.down_proj.weight")
        assert torch.equal(tensor, expected), (name, expert)


@pytest.fixture
def float8_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_checkpoint("deepseek_v3", folder)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(folder, quantization_config=config)
    return folder


def test_float8_blocks_are_expanded(float8_folder: Path, tmp_path: Path) -> None:
    tensors = edit(float8_folder, lambda tensors: to_float8_blocks(tensors, BLOCK, BLOCK))
    plan = shard(float8_folder, tmp_path / "store")
    assert plan.precision == "float8 blocks expanded to bfloat16"
    assert "quantization_config" not in json.loads(plan.config)
    check_expanded(plan, tmp_path / "store", tensors, BLOCK, BLOCK)


def test_float8_blocks_are_expanded_as_transformers_does(float8_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers loads float8 with it only")
    edit(float8_folder, lambda tensors: to_float8_blocks(tensors, BLOCK, BLOCK))
    plan = shard(float8_folder, tmp_path / "store")
    check_against_transformers(float8_folder, tmp_path / "store", plan)


def test_the_last_row_of_blocks_may_be_cut(float8_folder: Path, tmp_path: Path) -> None:
    """In DeepSeek-V3, kv_a_proj_with_mqa has 576 rows in blocks of 128, so the last has 64. Here 24 in blocks of 16."""
    edit_config(float8_folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dense = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        return tensors | to_float8_blocks(dense, 16, 8)

    tensors = edit(float8_folder, change)
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape[0] == 24
    plan = shard(float8_folder, tmp_path / "store")
    check_expanded(plan, tmp_path / "store", tensors, 16, 8)


@pytest.mark.parametrize("step", [1, 3, 10_000])
def test_bands_of_any_number_of_rows_make_the_same(
    float8_folder: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = edit(float8_folder, lambda tensors: to_float8_blocks(tensors, BLOCK, BLOCK))
    monkeypatch.setattr("moeinf.sharding._CHUNK_BYTES", 64 * BLOCK * step)
    plan = shard(float8_folder, tmp_path / "store")
    check_expanded(plan, tmp_path / "store", tensors, BLOCK, BLOCK)


@pytest.mark.parametrize(
    ("weight", "scales"),
    [((slice(None), slice(-BLOCK)), (slice(None), slice(-1))), ((slice(None),), (slice(-1),))],
    ids=["columns", "scales"],
)
def test_float8_blocks_of_another_shape_are_named(
    weight: tuple[slice, ...], scales: tuple[slice, ...], float8_folder: Path, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = to_float8_blocks(tensors, BLOCK, BLOCK)
        cut = {name: packed[name][weight], f"{name}_scale_inv": packed[f"{name}_scale_inv"][scales]}
        return packed | {each: tensor.contiguous() for each, tensor in cut.items()}

    edit(float8_folder, change)
    with pytest.raises(IntegrityError, match=f"{name} .*cannot be made of {name}"):
        shard(float8_folder, tmp_path / "store")


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_one_scale_for_a_whole_tensor(shape: tuple[int, ...], float8_folder: Path, tmp_path: Path) -> None:
    edit_config(float8_folder, quantization_config={"quant_method": "fp8", "weight_block_size": None})

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = to_float8_blocks(tensors, 1024, 1024)
        return {n: t.reshape(shape) if n.endswith("scale_inv") else t for n, t in packed.items()}

    tensors = edit(float8_folder, change)
    plan = shard(float8_folder, tmp_path / "store")
    grids = {n: t.reshape(1, 1) if n.endswith("scale_inv") else t for n, t in tensors.items()}
    check_expanded(plan, tmp_path / "store", grids, 1024, 1024)


def test_mxfp4_is_expanded(tmp_path: Path) -> None:
    """gpt_oss's experts as released: two 4-bit floats a byte, one exponent for 32, rows and columns exchanged."""
    folder, out = tmp_path / "model", tmp_path / "store"
    make_checkpoint("gpt_oss", folder)
    tensors = pack_mxfp4(folder, (118, 130))
    plan = shard(folder, out)
    assert plan.precision == "mxfp4 expanded to bfloat16"
    check_against_transformers(folder, out, plan)

    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    name = f"{plan.layers[1].module}.down_proj"
    blocks, scales = tensors[f"{name}_blocks"][5].long(), tensors[f"{name}_scales"][5].float()
    numbers = values[torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)] * torch.exp2(scales - 127)[..., None]
    stored = load_file(out / expert_path(1, 5))["down_proj"]
    assert torch.equal(stored, numbers.flatten(-2).T.to(torch.bfloat16))


def test_numbers_without_their_scales_are_not_taken_for_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint("granitemoe", folder)
    edit(folder, lambda tensors: {n: t.to(torch.float8_e4m3fn) if t.dim() == 3 else t for n, t in tensors.items()})
    with pytest.raises(UnsupportedError, match="packed as F8_E4M3"):
        shard(folder, tmp_path / "store")


def test_dense_numbers_without_their_scales_are_not_taken_for_weights(tmp_path: Path) -> None:
    folder, name = tmp_path / "model", "model.embed_tokens.weight"
    make_checkpoint("olmoe", folder)
    edit(folder, lambda tensors: {**tensors, name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(UnsupportedError, match=f"{name} is packed as F8_E4M3"):
        shard(folder, tmp_path / "store")


# Files that come one by one, and work that was interrupted


def sharded_folder(tmp_path: Path) -> Path:
    make_checkpoint("qwen3_moe", tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 4
    return tmp_path / "model"


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("is_reversed", [False, True])
def test_files_may_come_in_any_order_and_go_as_soon_as_they_are_finished(tmp_path: Path, is_reversed: bool) -> None:
    folder, out = sharded_folder(tmp_path), tmp_path / "store"
    shard(folder, out)
    expected = contents(out)
    checkpoint = Checkpoint.from_folder(folder)
    plan = plan_conversion(checkpoint)
    again = tmp_path / "again"
    again.mkdir()
    with Sharder(plan, FolderSink(again)) as sharder:
        assert sharder.finished_files() == ()
        for name in sorted(checkpoint.weight_files, reverse=is_reversed):
            sharder.add_file(folder / name)
            for finished in sharder.finished_files():
                (folder / finished).unlink(missing_ok=True)
        assert sharder.finished_files() == checkpoint.weight_files
        sharder.finish()
    assert not list(folder.glob("*.safetensors"))
    assert contents(again) == expected


def test_a_file_that_is_finished_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the disk would keep its bytes when it is removed."""
    folder = sharded_folder(tmp_path)
    checkpoint = Checkpoint.from_folder(folder)
    plan = plan_conversion(checkpoint)
    (tmp_path / "store").mkdir()
    closed, close = set(), TensorFile.close

    def note(file: TensorFile) -> None:
        closed.add(file.path.name)
        close(file)

    monkeypatch.setattr(TensorFile, "close", note)
    with Sharder(plan, FolderSink(tmp_path / "store")) as sharder:
        sharder.add_file(folder / checkpoint.weight_files[-1])
    assert closed == {checkpoint.weight_files[-1]}
    closed.clear()
    with Sharder(plan, FolderSink(tmp_path / "store")) as sharder:
        for name in checkpoint.weight_files:
            sharder.add_file(folder / name)
            assert closed == set(sharder.finished_files())
        sharder.finish()


def test_nothing_is_finished_before_all_that_needs_it_is_written(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path)
    checkpoint = Checkpoint.from_folder(folder)
    (tmp_path / "store").mkdir()
    first, *others = checkpoint.weight_files
    with Sharder(plan_conversion(checkpoint), FolderSink(tmp_path / "store")) as sharder:
        for count, name in enumerate(others, 1):
            sharder.add_file(folder / name)
            assert set(sharder.finished_files()) <= set(others[:count])
        with pytest.raises(IntegrityError, match=f"outputs were not written: they wait for .*{first}"):
            sharder.finish()
        sharder.add_file(folder / first)
        sharder.finish()


def test_work_that_was_done_before_a_crash_is_not_done_again(tmp_path: Path) -> None:
    folder, out = sharded_folder(tmp_path), tmp_path / "store"
    shard(folder, out)
    expected = contents(out)
    checkpoint = Checkpoint.from_folder(folder)
    again = tmp_path / "again"
    again.mkdir()
    sink = FolderSink(again)
    crashes = 0
    plan = plan_conversion(checkpoint)
    while DENSE_NAME not in sink.done:
        sink.patience = 11
        with suppress(InterruptedError), Sharder(plan, sink) as sharder:
            crashes += 1
            for name in checkpoint.weight_files:
                if name not in sharder.finished_files():
                    sharder.add_file(folder / name)
            sharder.finish()
    assert crashes > 5
    assert len(sink.written) == len(set(sink.written))
    assert contents(again) == expected
    sink.patience = 0
    with Sharder(plan, sink) as sharder:
        assert sharder.finished_files() == checkpoint.weight_files
        sharder.finish()


def test_a_file_with_nothing_of_use_is_never_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint("olmoe", folder)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    save_file({"mtp.weight": torch.zeros(4)}, folder / "model-2.safetensors")
    checkpoint = Checkpoint.from_folder(folder)
    plan = plan_conversion(checkpoint)
    assert plan.ignored == ("mtp.weight",)
    (tmp_path / "store").mkdir()
    with Sharder(plan, FolderSink(tmp_path / "store")) as sharder:
        assert sharder.finished_files() == ("model-2.safetensors",)
        sharder.add_file(folder / "model-1.safetensors")
        sharder.finish()


# What is wrong with weights


@pytest.mark.parametrize(
    ("family", "name", "complaint"),
    [
        ("olmoe", "model.embed_tokens.weight", r"model\.embed_tokens\.weight .*cannot be made of"),
        ("olmoe", "model.layers.0.mlp.experts.3.down_proj.weight", "give an expert the shape"),
        ("olmoe", "model.layers.0.mlp.experts.3.gate_proj.weight", "cannot be made of"),
        ("granitemoe", "model.layers.1.block_sparse_moe.input_linear.weight", "one row for each of 8 experts"),
    ],
)
def test_weights_of_the_wrong_shape(tmp_path: Path, family: str, name: str, complaint: str) -> None:
    folder = tmp_path / "model"
    make_checkpoint(family, folder)
    edit(folder, lambda tensors: {**tensors, name: tensors[name][:-1, :-1]})
    with pytest.raises(IntegrityError, match=complaint) as caught:
        shard(folder, tmp_path / "store")
    assert name in str(caught.value)


@pytest.mark.parametrize(("rows", "columns"), [(-1, None), (None, -1)])
def test_a_dense_matrix_that_lacks_a_row_or_a_column(rows: int | None, columns: int | None, tmp_path: Path) -> None:
    folder, name = tmp_path / "model", "model.embed_tokens.weight"
    make_checkpoint("olmoe", folder)
    edit(folder, lambda tensors: {**tensors, name: tensors[name][:rows, :columns]})
    with pytest.raises(IntegrityError, match=rf"{name} \(shape \[128, 32\]\) cannot be made of"):
        shard(folder, tmp_path / "store")


def test_a_scalar_is_no_vector(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint("olmoe", folder)
    edit(folder, lambda tensors: {**tensors, "model.norm.weight": torch.tensor(1.0, dtype=torch.bfloat16)})
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight .*cannot be made of"):
        shard(folder, tmp_path / "store")


def test_a_shard_that_came_without_a_tensor_of_the_index(tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path)
    checkpoint = Checkpoint.from_index(folder)
    plan = plan_conversion(checkpoint)
    first, *others = (folder / name for name in checkpoint.weight_files)
    tensors = load_file(first)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, first)
    (tmp_path / "store").mkdir()
    with Sharder(plan, FolderSink(tmp_path / "store")) as sharder:
        for path in others:
            sharder.add_file(path)
        with pytest.raises(IntegrityError, match="lacks the tensor"):
            sharder.add_file(first)


# Memory

MEMORY = """
import resource, sys
from pathlib import Path
from moeinf.checkpoint import Checkpoint
from moeinf.conversion import plan_conversion
from moeinf.sharding import Sharder

class Nowhere:
    def is_done(self, path): return False
    def write(self, path, chunks):
        for chunk in chunks: pass
    def dense(self, path, header, size): return self
    def write_at(self, offset, data): pass
    def mark_done(self, tensor): pass
    def close(self): pass

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

checkpoint = Checkpoint.from_folder(Path(sys.argv[1]))
plan = plan_conversion(checkpoint)
before = peak()
with Sharder(plan, Nowhere()) as sharder:
    sharder.add_file(checkpoint.folder / "model.safetensors")
    sharder.finish()
print(peak() - before, plan.layout.nbytes)
"""


def test_memory_does_not_grow_with_fused_experts_or_large_dense_tensors(tmp_path: Path) -> None:
    """256 MiB of fused experts and 200 MiB of embedding in float32: zeros that take no room on the disk."""
    from transformers import GraniteMoeConfig

    experts, hidden, width, vocab = 128, 512, 683, 100_352
    config = GraniteMoeConfig(
        num_hidden_layers=1, hidden_size=hidden, intermediate_size=width, num_local_experts=experts, vocab_size=vocab,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": ("F32", (vocab, hidden)),
        "model.norm.weight": ("BF16", (hidden,)),
        **{f"{layer}{name}_layernorm.weight": ("BF16", (hidden,)) for name in ("input", "post_attention")},
        **{f"{layer}self_attn.{name}_proj.weight": ("BF16", (hidden, hidden)) for name in "qo"},
        **{f"{layer}self_attn.{name}_proj.weight": ("BF16", (hidden // 2, hidden)) for name in "kv"},
        f"{layer}block_sparse_moe.router.layer.weight": ("BF16", (experts, hidden)),
        f"{layer}block_sparse_moe.input_linear.weight": ("BF16", (experts, 2 * width, hidden)),
        f"{layer}block_sparse_moe.output_linear.weight": ("BF16", (experts, hidden, width)),
    }
    described = [(name, dtype, shape) for name, (dtype, shape) in shapes.items()]
    size = sum(torch.Size(shape).numel() * (4 if dtype == "F32" else 2) for _, dtype, shape in described)
    header = encode_header(described)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    growth_bytes, expert_bytes = map(int, result.stdout.split())
    assert size > 400 << 20
    assert growth_bytes < (120 << 20) + 2 * expert_bytes


def test_tensors_are_taken_in_the_order_of_transformers() -> None:
    """Experts are numbered by their place in this order, so 10 must come after 9."""
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in (2, 10) for expert in (0, 9, 10, 100)]
    names.reverse()
    assert sorted(names, key=dot_natural_key) == names[::-1]
