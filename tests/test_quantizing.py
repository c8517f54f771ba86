"""Models with quantised experts: made of a stored model or while pulling, the same bytes either way; and run, against
transformers with the weights that the numbers stand for.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moeinf
from families import make_checkpoint
from faults import FailingDisk
from moeinf import kernels, shared_library
from moeinf import pull as pull_module
from moeinf.densefile import PACKED_NAME
from moeinf.errors import CapacityError, IntegrityError, MoeinfError, UnsupportedError, UsageError
from moeinf.forms import ExpertForm
from moeinf.incoming import Incoming
from moeinf.manifest import MANIFEST_NAME, Quantization, expert_path
from moeinf.metamodel import is_experts_module
from moeinf.pull import plan_pull, pull
from moeinf.quantized import dequantize, quantize
from moeinf.quantizing import quantize_model
from moeinf.store import Store, StoredModel
from moeinf.tensorfile import TensorFile
from moeinf.trace import ModelIdentity
from packing import rewrite

PROMPT = torch.randint(5, 100, (1, 21), generator=torch.Generator().manual_seed(1))
NEW_TOKENS = 24
FAMILIES = (
    *("aria_text", "beam", "deepseek_v3", "gemma4_text", "gpt_oss", "granitemoe", "inkling2_text", "jamba"),
    *("minimax_m2", "mixtral", "nemotron_h", "qwen3_moe"),
)
"""Gates first, in turn and none; weights both ways round; biases; an activation that the library does not have."""
INT4, INT8 = ExpertForm("int4", 16), ExpertForm("int8", 64)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mix"
    make_checkpoint("mixtral", folder)
    return folder


@pytest.fixture
def plain(checkpoint: Path, store: Store) -> StoredModel:
    return pull(str(checkpoint), store=store)


def contents(model: StoredModel) -> dict[str, bytes]:
    return {path: (model.path / path).read_bytes() for path in model.manifest.files}


# The maths


def greedy(model: Any) -> list[int]:
    tokens: torch.Tensor = model.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tokens[0, PROMPT.shape[1] :].tolist()


def replace_weights(model: torch.nn.Module, form: ExpertForm) -> None:
    """Give every expert the weights that its numbers will stand for."""
    bits = {"int8": 8, "int4": 4}[form.kind]
    for module in filter(is_experts_module, model.modules()):
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:
                for weight in parameter.data:
                    rows = weight.t() if module.is_transposed else weight
                    about = Quantization(form.kind, form.group, "F32", {})
                    made = dequantize(*quantize(rows, bits, form.group), about, rows.shape[1], weight.dtype)
                    weight.copy_(made.t() if module.is_transposed else made)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", [INT8, INT4], ids=lambda form: form.kind)
@pytest.mark.filterwarnings("ignore")  # what transformers and torch say about families of theirs
def test_the_output_is_that_of_the_weights_that_the_numbers_stand_for(
    family: str, form: ExpertForm, home: Path, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path, "float32")
    auto: Any = AutoModelForCausalLM  # untyped
    reference = auto.from_pretrained(tmp_path, dtype=torch.float32, experts_implementation="eager")
    replace_weights(reference, form)
    with torch.inference_mode():
        logits = reference(PROMPT).logits
        tokens = greedy(reference)
    pull(str(tmp_path), store=Store(home), name="model", experts=form.kind, group=form.group)
    for kinds in ("torch", "auto"):
        with moeinf.load("model", experts="50%", kernels=kinds) as engine, torch.inference_mode():
            found = engine.model(PROMPT).logits
            scale = 1e-5 if kinds == "torch" else 2e-3
            assert (found - logits).abs().max() <= scale * logits.abs().max()
            engine.generation_config.eos_token_id = None
            sampling = moeinf.Sampling(max_tokens=NEW_TOKENS, temperature=0)
            assert list(engine.session().generate(PROMPT[0].tolist(), sampling).tokens) == tokens
            stats = engine.stats()
            assert stats.quantization == f"{form.kind} experts (groups of {form.group})"
            is_native = shared_library.built_library() is not None and family != "inkling2_text"
            assert stats.kernels.startswith("native" if kinds == "auto" and is_native else "torch")


def test_without_the_library_torch_computes_numbers_too(
    plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEINF_HOME", str(store.home))
    monkeypatch.setattr(shared_library, "built_library", lambda: None)
    quantize_model(plain, "small", INT4, store=store)
    with moeinf.load("small") as engine:
        assert engine.stats().kernels.startswith("torch: the native library is not built")
        assert len(engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=3)).tokens) >= 1


def test_numbers_are_not_tried_for_exactness(plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEINF_HOME", str(store.home))
    monkeypatch.setattr(kernels, "_is_exact", lambda *_: pytest.fail("nothing is exact here"))
    quantize_model(plain, "small", INT8, store=store)
    moeinf.load("small").close()


# The store


def test_a_stored_model_gives_what_a_pull_gives(plain: StoredModel, checkpoint: Path, store: Store) -> None:
    before = contents(plain)
    made = quantize_model(plain, "small", INT4, store=store)
    assert contents(plain) == before
    assert store.verify("small") == []
    assert contents(made) == contents(pull(str(checkpoint), store=store, name="pulled", experts="int4"))
    there, of = made.manifest, plain.manifest
    assert (there.source, there.dtype, there.layers) == (of.source, of.dtype, of.layers)
    assert there.precision == "int4 experts (groups of 16), from bfloat16"
    with TensorFile.open(made.path / expert_path(1, 7)) as file:
        assert list(file.entries) == ["gate_up_proj_scales", "down_proj_scales", "gate_up_proj", "down_proj"]


def test_files_without_experts_are_shared(plain: StoredModel, store: Store) -> None:
    made = quantize_model(plain, "small", INT8, store=store)
    own = {path for path in made.manifest.files if path.startswith("experts/")} | {PACKED_NAME}
    assert set(made.manifest.files) - own == set(plain.manifest.files) - own - {"dense.safetensors"}
    for path in made.manifest.files:
        is_shared = path in plain.manifest.files and os.path.samefile(plain.path / path, made.path / path)
        assert is_shared == (path not in own)
    store.remove(plain.name)
    assert store.verify("small") == []


def test_where_a_disk_cannot_link_files_are_copied(
    plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.disk, "link", lambda *_: False)
    made = quantize_model(plain, "small", INT8, store=store)
    assert store.verify("small") == []
    assert all((made.path / path).stat().st_nlink == 1 for path in made.manifest.files)


def test_whatever_the_disk_does_both_models_are_whole_or_absent(plain: StoredModel, store: Store) -> None:
    """Every operation fails once. What was written is kept, and the model that is read from never changes."""
    before = contents(plain)
    for fail_at in itertools.count(1, 7):
        disk = FailingDisk(fail_at)
        failing = Store(store.home, disk=disk)
        try:
            quantize_model(plain, "small", INT4, store=failing)
        except MoeinfError:
            assert contents(plain) == before
        if not disk.has_failed:
            break
        made = quantize_model(plain, "small", INT4, store=store)
        assert store.verify("small") == store.verify(plain.name) == []
        assert contents(plain) == before
        store.remove(made.name)
    assert fail_at > 20


class InterruptedProgress:
    """A person who presses Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def task(self, label: str, total: int, unit: str, *, done: int = 0) -> Iterator[InterruptedProgress]:
        yield self

    def advance(self, amount: int) -> None:
        self.left -= amount
        if not self.left:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(plain: StoredModel, store: Store) -> None:
    notes: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        quantize_model(plain, "small", INT4, store=store, progress=InterruptedProgress(5))
    assert (store.names(), store.unfinished()) == (["mix"], ["small"])
    quantize_model(plain, "small", INT4, store=store, notify=notes.append)
    assert [note.split(":")[0] for note in notes] == ["going on with small"]
    assert store.verify("small") == []


def test_an_unfinished_pull_of_that_name_is_not_taken_away(plain: StoredModel, store: Store) -> None:
    with store.incoming("small") as incoming:
        incoming.begin({"source": "org/other"})
        incoming.write("config.json", [b"{}"])
        incoming.sync()
    with pytest.raises(UsageError, match="small is unfinished, and made of org/other") as caught:
        quantize_model(plain, "small", INT4, store=store)
    assert "`moeinf rm small`" in (caught.value.hint or "")
    assert (incoming.model / "config.json").read_bytes() == b"{}"
    quantize_model(plain, "small", INT4, store=store, force=True)
    assert store.verify("small") == []


def test_what_another_process_made_meanwhile_is_not_made_again(
    plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_lock = store.incoming

    def take_lock_late(name: str, doing: str) -> AbstractContextManager[Incoming]:
        monkeypatch.setattr(store, "incoming", take_lock)
        quantize_model(plain, name, INT4, store=store)
        return take_lock(name, doing)

    monkeypatch.setattr(store, "incoming", take_lock_late)
    progress = SimpleNamespace(task=lambda *_, **__: pytest.fail("it is here"))
    assert quantize_model(plain, "small", INT4, store=store, progress=progress) == store.open("small")


def test_what_is_here_is_not_made_again(plain: StoredModel, checkpoint: Path, store: Store) -> None:
    made = quantize_model(plain, "small", INT4, store=store)
    notes: list[str] = []
    assert quantize_model(plain, "small", INT4, store=store, notify=notes.append) == made
    assert notes == [f"small is here already, made of {checkpoint}"]
    with pytest.raises(UsageError, match=r"small is here already, and is .* in int4 experts") as caught:
        quantize_model(plain, "small", INT8, store=store)
    assert "--force" in (caught.value.hint or "")
    again = quantize_model(plain, "small", INT8, store=store, force=True)
    assert again.manifest.layout.quantization is not None
    assert again.manifest.layout.quantization.kind == "int8"


def test_what_cannot_be_quantised(plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = quantize_model(plain, "small", INT4, store=store)
    with pytest.raises(UnsupportedError, match=r"small has int4 experts \(groups of 16\) already"):
        quantize_model(made, "smaller", INT8, store=store)
    with pytest.raises(UsageError, match="mix is the model itself"):
        quantize_model(plain, "mix", INT4, store=store)
    for experts, group, complaint in (
        ("int3", None, "--experts int3 is not known"),
        ("int4", 32, "--group 32 is none that int4"),
    ):
        with pytest.raises(UsageError, match=complaint):
            ExpertForm.read(experts, group)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500))
    with pytest.raises(CapacityError, match=r"needs .* more disk, and 500 B are free"):
        quantize_model(plain, "other", INT4, store=store)


@pytest.mark.parametrize("of", ["plain", "lossless"])
def test_room_is_asked_for_what_is_written(
    of: str, plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts and a dense part that is packed now; one that was packed before is linked."""
    model = plain if of == "plain" else quantize_model(plain, of, ExpertForm.read(of, None), store=store)
    there = quantize_model(model, "small", INT4, store=store).manifest
    store.remove("small")
    needed = there.num_experts * there.layout.file_bytes + (there.dense_bytes if of == "plain" else 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(CapacityError, match=r"small needs .* more disk"):
        quantize_model(model, "small", INT4, store=store)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert quantize_model(model, "small", INT4, store=store).manifest == there


def test_room_is_asked_of_the_disk_where_models_are(
    plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {store.home: 0, store.models: 1 << 30}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    assert quantize_model(plain, "small", INT4, store=store).name == "small"


def test_weights_that_are_not_finite_are_named(plain: StoredModel, checkpoint: Path, store: Store) -> None:
    data = (plain.path / expert_path(1, 3)).read_bytes()
    plain = rewrite(plain, expert_path(1, 3), data[:-2] + b"\xc0\x7f")  # NaN in bfloat16
    with pytest.raises(IntegrityError, match=r"down_proj of expert 3 of model\.layers\.1\.mlp\.experts holds NaN"):
        quantize_model(plain, "small", INT4, store=store)
    assert store.names() == ["mix"]


@pytest.mark.parametrize("path", [expert_path(1, 3), "dense.safetensors"])
@pytest.mark.parametrize("form", [INT4, ExpertForm("lossless", 16)], ids=["int4", "lossless"])
def test_damage_is_not_carried_over(path: str, form: ExpertForm, plain: StoredModel, store: Store) -> None:
    damaged = bytearray((plain.path / path).read_bytes())
    damaged[-1] ^= 1
    (plain.path / path).write_bytes(damaged)
    with pytest.raises(IntegrityError, match=f"mix: {path}: has other bytes than were written"):
        quantize_model(plain, "small", form, store=store)
    assert store.names() == ["mix"]


def test_damage_is_not_copied_where_disks_have_no_links(
    plain: StoredModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (plain.path / "tokenizer.json").open("ab") as stream:
        stream.write(b" ")
    monkeypatch.setattr(store.disk, "link", lambda *_: False)
    with pytest.raises(IntegrityError, match=r"tokenizer.json has other bytes than were written"):
        quantize_model(plain, "small", INT4, store=store)


def test_a_model_that_is_replaced_meanwhile_is_not_mixed(plain: StoredModel, store: Store) -> None:
    (plain.path / MANIFEST_NAME).write_text(dataclasses.replace(plain.manifest, precision="another").to_json())
    with pytest.raises(MoeinfError, match="mix was replaced meanwhile"):
        quantize_model(plain, "small", INT4, store=store)


# Pull


def test_a_pull_has_a_name_of_its_own(checkpoint: Path, store: Store) -> None:
    plan = plan_pull(str(checkpoint), store=store, experts="int4")
    small = pull(str(checkpoint), store=store, experts="int4")
    assert small.name == plan.name == "mix-int4"
    assert plan.precision == small.manifest.precision
    assert plan.store_bytes < plan_pull(str(checkpoint), store=store).store_bytes
    assert store.resolve(str(checkpoint)).name == "mix-int4", "all there is of it"
    whole = pull(str(checkpoint), store=store)
    assert whole.name == "mix"
    assert store.resolve(str(checkpoint)).name == "mix", "the model itself comes first"
    notes: list[str] = []
    assert pull("mix-int4", store=store, notify=notes.append).name == "mix-int4"
    assert pull("mix", store=store, experts="int4", notify=notes.append).name == "mix-int4"
    assert pull("mix", store=store, experts="bf16", notify=notes.append).name == "mix"
    assert len(notes) == 3, "all of them were here"


def test_what_a_pull_refuses(checkpoint: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="--group says how int8 experts are grouped"):
        pull(str(checkpoint), store=store, group=32)
    with pytest.raises(UsageError, match="--experts bf16: the model is float32"):
        pull(str(checkpoint), store=store, dtype="float32", experts="bf16")
    pull(str(checkpoint), store=store, name="mix")
    with pytest.raises(UsageError, match="mix is here already"):
        pull(str(checkpoint), store=store, name="mix", experts="int8")


def test_the_demo_is_never_taken_for_its_quantised_self(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pull("demo", store=store, experts="int8").name == "demo-int8"
    assert pull_module.resolve("demo", store).manifest.layout.quantization is None


def test_what_is_learned_of_one_is_not_believed_of_the_other(plain: StoredModel, store: Store) -> None:
    made = quantize_model(plain, "small", INT4, store=store)
    whole, small = (ModelIdentity.of(model.name, model.manifest) for model in (plain, made))
    assert whole.difference(small) == "it has int4 experts (groups of 16), not plain experts"
    assert small.difference(whole) == "it has plain experts, not int4 experts (groups of 16)"
    assert small.difference(small) is None
