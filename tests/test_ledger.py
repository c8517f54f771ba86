"""The ledger: what it promises holds for every machine and model."""

from __future__ import annotations

import random

import pytest

from moeinf.errors import CapacityError, UsageError
from moeinf.ledger import MemoryPlan, ModelShape, make_plan
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec

MIB = 1 << 20
SHAPE = ModelShape(
    hidden=1024, widest=2048, vocabulary=32000, score_heads=0, layers=16, head_bytes=64 * MIB, lookup_bytes=0
)


def make_manifest(*, layers: int = 16, experts: int = 64, top_k: int = 8, dense: int = 200 * MIB) -> Manifest:
    tensors = (
        TensorSpec("gate_up_proj", "BF16", (1024, 1024), 0),
        TensorSpec("down_proj", "BF16", (1024, 512), 2 * MIB),
    )
    return Manifest(
        source=Source("test/model"),
        architecture="TestForCausalLM",
        model_type="test",
        dtype="bfloat16",
        precision="bfloat16",
        layers=tuple(MoeLayer(f"layers.{layer}", experts, top_k) for layer in range(layers)),
        layout=ExpertLayout(4096, tensors),
        dense_files=("dense.safetensors",),
        dense_bytes=dense,
        kv_token_bytes=16384,
        kv_fixed_bytes=0,
        max_context=32768,
        files={},
    )


def plan(available: int, manifest: Manifest | None = None, **options: str | int) -> MemoryPlan:
    return make_plan(manifest or make_manifest(), SHAPE, available_bytes=available, **options)  # type: ignore[arg-type]


def test_random_machines_never_exceed_their_budget() -> None:
    chance = random.Random(1)
    refused = 0
    for _ in range(500):
        manifest = make_manifest(
            layers=chance.randint(1, 48), experts=chance.choice([8, 64, 128]), dense=chance.randint(1, 4000) * MIB
        )
        available = chance.randint(100, 40_000) * MIB
        try:
            made = plan(available, manifest)
        except CapacityError:
            refused += 1
            continue
        assert made.total <= made.budget < available
        assert 8 <= made.slots <= manifest.num_experts
        assert 1 <= made.context <= manifest.max_context
        assert made.step_tokens <= made.prefill_tokens(0) <= made.prefill_tokens(made.slots)
        assert made.dense == manifest.dense_bytes
        assert made.kv_cache == made.context * manifest.kv_token_bytes
    assert 0 < refused < 300


def test_more_memory_never_means_fewer_slots() -> None:
    slots = [plan(available * MIB).slots for available in range(700, 6000, 100)]
    assert slots == sorted(slots)
    assert slots[-1] == 1024


def test_the_budget_that_is_named_would_do() -> None:
    with pytest.raises(CapacityError, match="the model needs") as caught:
        plan(4000 * MIB, host_memory="300MiB", context=4096)
    assert caught.value.hint is not None
    named = caught.value.hint.split()[3]
    assert plan(4000 * MIB, host_memory=named, context=4096).slots >= 8


def test_a_long_step_borrows_from_slots_what_the_budget_cannot_spare() -> None:
    roomy = plan(8000 * MIB, experts="100")
    assert roomy.lent_slots(2048) == 0
    tight = plan(8000 * MIB, host_memory="1GiB")
    assert tight.lent_slots(tight.step_tokens) == 0
    for tokens in (128, 1024, 2048):
        lent = tight.lent_slots(tokens) * tight.slot_bytes
        assert tight.total - lent + (tokens - tight.step_tokens) * tight.token_workspace <= tight.budget
    assert tight.prefill_tokens(0) == tight.step_tokens
    assert tight.prefill_tokens(tight.lent_slots(512)) == 512
    assert tight.prefill_tokens(tight.slots) == 2048


def test_options_are_kept() -> None:
    made = plan(8000 * MIB, experts="25%", context=1000)
    assert (made.slots, made.context) == (256, 1000)
    assert plan(8000 * MIB, experts="100").slots == 100
    assert plan(8000 * MIB, experts="99999").slots == 1024
    assert plan(8000 * MIB, experts="0.1%").slots == 8
    assert plan(8000 * MIB, host_memory="50%").budget == 4000 * MIB


def test_regimes_and_thrashing() -> None:
    assert plan(8000 * MIB).regime == "resident"
    streaming = plan(8000 * MIB, experts="127")
    assert streaming.regime == "streaming"
    assert streaming.thrashes
    assert not plan(8000 * MIB, experts="128").thrashes


@pytest.mark.parametrize("experts", ["", "0", "-1", "0%", "101%", "many", "12.5"])
def test_experts_must_be_a_number_or_a_share(experts: str) -> None:
    with pytest.raises(UsageError, match="is neither a number nor a share"):
        plan(8000 * MIB, experts=experts)


def test_below_one_layers_need_is_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(CapacityError) as caught:
        plan(8000 * MIB, experts="7")
    assert caught.value.hint == "give it --experts 8 or more"


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--context 40000 is more than the 32768 tokens"):
        plan(8000 * MIB, context=40000)


def test_a_slot_rounds_an_expert_up_to_whole_pages() -> None:
    assert plan(8000 * MIB).slot_bytes == 3 * MIB
