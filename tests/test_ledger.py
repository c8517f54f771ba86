"""The ledger: what it promises holds for every machine and model."""

from __future__ import annotations

import dataclasses
import mmap
import random
from functools import partial
from typing import Any

import pytest

from moeinf.errors import CapacityError, UsageError
from moeinf.ledger import (
    Libraries,
    MemoryPlan,
    ModelShape,
    can_cache_files,
    make_device_plan,
    make_plan,
    slot_bytes,
)
from moeinf.manifest import ExpertLayout, Manifest, MoeLayer, Source, TensorSpec

MIB = 1 << 20
SHAPE = ModelShape(
    hidden=1024, widest=2048, vocabulary=32000, score_heads=0, sharing=4, layers=16, head_bytes=64 * MIB, lookup_bytes=0
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
        assert made.step_tokens <= made.prefill_tokens(0, 100) <= made.prefill_tokens(made.slots, 100)
        assert made.dense == manifest.dense_bytes
        assert made.kv_cache == made.context * manifest.kv_token_bytes
    assert 0 < refused < 300


def test_what_is_made_of_latents_is_counted() -> None:
    manifest = make_manifest()
    made_anew = dataclasses.replace(SHAPE, expanded_bytes=9 * 1024)
    kept = dataclasses.replace(made_anew, kept_layers=16)

    def planned(shape: ModelShape, context: int | None = None) -> MemoryPlan:
        return make_plan(manifest, shape, available_bytes=4000 * MIB, context=context)

    plain, with_them, without = (planned(shape, 1000) for shape in (SHAPE, kept, made_anew))
    assert with_them.expanded == 1000 * 16 * kept.expanded_bytes
    assert with_them.kv_cache == plain.kv_cache + with_them.expanded
    assert (without.expanded, without.kv_cache) == (0, plain.kv_cache)
    assert plain.workspace < with_them.workspace < without.workspace
    assert planned(kept).context < planned(made_anew).context == planned(SHAPE).context


def test_more_memory_never_means_fewer_slots() -> None:
    slots = [plan(available * MIB).slots for available in range(700, 6000, 100)]
    assert slots == sorted(slots)
    assert slots[-1] == 1024


@pytest.mark.parametrize("options", [{"context": 4096}, {}, {"experts": "100"}], ids=str)
@pytest.mark.parametrize("budget", ["0", "300MiB"])
def test_the_budget_that_is_named_would_do(budget: str, options: dict[str, int | str]) -> None:
    with pytest.raises(CapacityError, match="the model needs") as caught:
        plan(4000 * MIB, host_memory=budget, **options)  # type: ignore[arg-type]
    assert caught.value.hint is not None
    named = caught.value.hint.split()[3]
    assert plan(4000 * MIB, host_memory=named, **options).slots >= 8  # type: ignore[arg-type]


def test_a_long_step_borrows_from_slots_what_the_budget_cannot_spare() -> None:
    roomy = plan(8000 * MIB, experts="100")
    assert roomy.lent_slots(2048, 2048) == 0
    tight = dataclasses.replace(plan(8000 * MIB, host_memory="1GiB"), token_room=0, prompt_room=0)
    assert tight.lent_slots(tight.step_tokens, 100) == 0
    for tokens in (128, 1024, 2048):
        lent = tight.lent_slots(tokens, tokens) * tight.slot_bytes
        assert tight.total - lent + (tokens - tight.step_tokens) * tight.token_workspace <= tight.budget
    assert tight.prefill_tokens(0, 512) == tight.step_tokens
    assert tight.prefill_tokens(tight.lent_slots(512, 512), 512) == 512
    assert tight.prefill_tokens(tight.slots, 2048) == 2048


def test_experts_have_the_room_of_tokens_that_are_yet_to_come() -> None:
    made = plan(8000 * MIB, host_memory="1GiB", context=8192)
    cached = make_manifest().kv_token_bytes
    assert made.token_room == cached + SHAPE.sharing * cached // 16, (
        "one layer's is repeated for the heads that share it"
    )
    assert made.slots_at(0) == made.most_slots
    assert made.slots == made.most_slots - made.lent_slots(2, made.context) < made.last_slots
    unlent = made.total - made.experts - made.context * made.token_room - made.prompt_room
    tightest = made.budget
    for held in range(0, made.context + 1, 64):
        rows = min(held + 128, made.context)  # those of one head lie together, and count by the page
        for tokens in (1, 2, 64, 128, 2048):
            touched = unlent + rows * made.token_room + (made.prompt_room if tokens > 1 else 0)
            touched += max(0, tokens - made.step_tokens) * made.token_workspace
            left = made.budget - touched - (made.most_slots - made.lent_slots(tokens, held)) * made.slot_bytes
            assert left >= 0
            tightest = min(tightest, left)
        assert made.last_slots <= made.slots_at(held + 1) <= made.slots_at(held)
    assert tightest < made.slot_bytes // 16, "and no more is lent than is needed"


def test_experts_have_no_room_that_is_not_theirs() -> None:
    anew = make_plan(
        make_manifest(),
        dataclasses.replace(SHAPE, grows_in_place=False),
        available_bytes=8000 * MIB,
        host_memory="1GiB",
    )
    assert anew.most_slots == anew.last_slots > anew.slots, "between prompts alone, when tokens come to another cache"
    for made in (plan(8000 * MIB, host_memory="1GiB", experts="100"), plan(8000 * MIB)):
        assert made.most_slots == made.slots


@pytest.mark.parametrize(
    ("takes_tokens", "widening", "room"), [(False, 1, 0), (True, 1, 64 * MIB), (True, 2, 0)], ids=["torch", "", "wide"]
)
def test_experts_have_the_room_of_weights_that_only_prompts_unpack(
    takes_tokens: bool, widening: int, room: int
) -> None:
    def prompt_room(manifest: Manifest) -> int:
        return make_plan(
            manifest,
            SHAPE,
            available_bytes=8000 * MIB,
            libraries=Libraries(takes_tokens=takes_tokens),
            widening=widening,
        ).prompt_room

    manifest = make_manifest()
    packed = dataclasses.replace(manifest, packed_dense={"lm_head": (32768, 1024)})
    assert prompt_room(packed) - prompt_room(manifest) == room


def test_a_table_stays_on_disk_unless_there_is_room_for_it_beside_all_experts() -> None:
    manifest = make_manifest()
    shape = dataclasses.replace(SHAPE, lookup_bytes=64 * MIB, table="embed_tokens.weight")

    def both(available: int, **options: Any) -> tuple[MemoryPlan, MemoryPlan]:
        plans = (
            make_plan(manifest, each, available_bytes=available, context=1024, **options) for each in (SHAPE, shape)
        )
        return next(plans), next(plans)

    plain, lean = both(1200 * MIB)
    assert (lean.dense, lean.looked_up) == (plain.dense - 64 * MIB, 64 * MIB)
    assert lean.slots - plain.slots in (64 // 3, 64 // 3 + 1)
    assert lean.total <= lean.budget
    plain, lean = both(8 * 1024 * MIB)
    assert plain.regime == "resident"
    assert lean == plain
    plain, lean = both(plain.total - MIB, host_memory=f"{plain.total // MIB - 1}MiB")  # all fit but for the table
    assert (plain.regime, lean.regime, lean.looked_up) == ("streaming", "resident", 64 * MIB)
    plain, lean = both(8 * 1024 * MIB, experts="100%")
    assert lean == plain
    plain, lean = both(8 * 1024 * MIB, widening=2, host_memory="2GiB")
    assert (lean.looked_up, lean) == (0, plain)


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


@pytest.mark.parametrize("experts", ["", "0", "-1", "0%", "many", "12.5"])
def test_experts_must_be_a_number_or_a_share(experts: str) -> None:
    with pytest.raises(UsageError, match="is neither a number nor a share"):
        plan(8000 * MIB, experts=experts)


def test_a_share_of_the_experts_is_no_more_than_all() -> None:
    with pytest.raises(UsageError, match="101% is more than there are"):
        plan(8000 * MIB, experts="101%")


def test_a_shorter_context_is_proposed_where_it_helps() -> None:
    with pytest.raises(CapacityError) as caught:
        plan(1)
    assert "context" not in str(caught.value.hint)


def test_a_context_that_is_chosen_is_halved_until_it_fits() -> None:
    for tokens in (4096, 2048, 512):
        budget = str(plan(8000 * MIB, experts="1000", context=tokens).total)
        assert plan(8000 * MIB, experts="1000", host_memory=budget).context == tokens


def test_a_window_has_room_for_a_sixteenth_more() -> None:
    plain = make_manifest()
    sliding = dataclasses.replace(plain, kv_fixed_bytes=64 * MIB)
    more = plan(4000 * MIB, sliding, context=512).workspace - plan(4000 * MIB, plain, context=512).workspace
    assert more == 4 * MIB


def test_files_are_cached_where_all_of_them_have_room_beside_the_slots() -> None:
    manifest = make_manifest()
    made = plan(3000 * MIB, manifest)
    needed = made.total + manifest.experts_bytes
    assert can_cache_files(made, manifest, needed)
    assert not can_cache_files(made, manifest, needed - 1)


def test_below_one_layers_need_is_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(CapacityError) as caught:
        plan(8000 * MIB, experts="7")
    assert caught.value.hint == "give it --experts 8 or more"


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="--context 40000 is more than the 32768 tokens"):
        plan(8000 * MIB, context=40000)


def test_a_slot_rounds_an_expert_up_to_whole_pages() -> None:
    assert plan(8000 * MIB).slot_bytes == 3 * MIB


def test_slots_are_whole_pages_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = ExpertLayout(4096, (TensorSpec("up_proj", "F32", (5, 1000), 0),))
    for page, size in ((4096, 20480), (16384, 32768), (65536, 65536)):
        monkeypatch.setattr(mmap, "PAGESIZE", page)
        assert slot_bytes(layout) == size


KIB, GIB = 1 << 10, 1 << 30


def device_plan(device: int, host: int, manifest: Manifest | None = None, **options: str | int) -> MemoryPlan:
    return make_device_plan(
        manifest or make_manifest(),
        SHAPE,
        device_bytes=device,
        host_bytes=host,
        **options,  # type: ignore[arg-type]
    )


def test_random_gpus_and_hosts_never_exceed_their_budgets() -> None:
    chance = random.Random(2)
    refused = 0
    for _ in range(500):
        manifest = make_manifest(
            layers=chance.randint(1, 48), experts=chance.choice([8, 64, 128]), dense=chance.randint(1, 4000) * MIB
        )
        device, host = chance.randint(100, 40_000) * MIB, chance.randint(100, 40_000) * MIB
        try:
            made = device_plan(device, host, manifest)
        except CapacityError:
            refused += 1
            continue
        assert made.host is not None
        assert made.total <= made.budget < device
        assert made.host.total <= made.host.budget < host
        assert manifest.dense_bytes <= made.host.budget
        assert 8 <= made.slots <= manifest.num_experts
        assert 8 <= made.host.slots <= manifest.num_experts
        assert made.prefill_tokens(made.slots, 9999) == made.step_tokens >= 64
        assert made.lent_slots(1 << 20, 1 << 20) == 0
        assert made.workspace >= made.step_tokens * made.token_workspace
    assert 0 < refused < 300


def test_a_gpu_has_no_table_either() -> None:
    manifest, shape = make_manifest(), dataclasses.replace(SHAPE, lookup_bytes=64 * MIB, table="embed_tokens.weight")
    for device, is_resident in ((1200, False), (8000, True)):
        plain, lean = (
            make_device_plan(manifest, each, device_bytes=device * MIB, host_bytes=2000 * MIB, context=1024)
            for each in (SHAPE, shape)
        )
        assert (plain.regime == "resident") == is_resident
        assert lean.looked_up == (0 if is_resident else 64 * MIB)
        assert lean.dense + lean.looked_up == plain.dense
        assert (lean.slots > plain.slots) != is_resident
    small: dict[str, Any] = {"device_bytes": 2000 * MIB, "host_bytes": 300 * MIB, "experts": "8", "context": 1024}
    assert make_device_plan(manifest, shape, **small).host  # less passes through host memory
    with pytest.raises(CapacityError, match="of host memory"):
        make_device_plan(manifest, SHAPE, **small)


def test_regimes_of_two_tiers() -> None:
    assert device_plan(8 * GIB, 8 * GIB).regime == "resident"
    assert device_plan(8 * GIB, 8 * GIB, experts="50%").regime == "host-cached"
    assert device_plan(8 * GIB, 2 * GIB, experts="50%").regime == "streaming"
    resident = device_plan(8 * GIB, 8 * GIB)
    assert resident.host is not None
    assert resident.host.slots == 32  # experts pass through, and are needed there no more
    assert resident.with_slots(1024).host == resident.host
    fewer = resident.with_slots(1023).host
    assert fewer is not None
    assert fewer.slots == 1024


@pytest.mark.parametrize("option", ["device_memory", "host_memory"])
def test_a_budget_above_what_is_free_is_refused_with_what_is(option: str) -> None:
    with pytest.raises(CapacityError, match=f"--{option.replace('_', '-')} is 9.00 GiB, and 8.00 GiB") as caught:
        device_plan(8 * GIB, 8 * GIB, **{option: "9GiB"})  # type: ignore[arg-type]
    assert caught.value.hint is not None
    device_plan(8 * GIB, 8 * GIB, **{option: caught.value.hint.split()[3]})  # type: ignore[arg-type]


@pytest.mark.parametrize(("dense", "options"), [(200, {}), (7800, {}), (200, {"experts": "100%"})], ids=str)
@pytest.mark.parametrize("option", ["device_memory", "host_memory"])
def test_the_budget_that_is_named_would_do_for_each_tier(option: str, dense: int, options: dict[str, Any]) -> None:
    """Also where little is left of it beside weights."""
    make = partial(device_plan, 16 * GIB, 16 * GIB, make_manifest(dense=dense * MIB), context=4096, **options)
    with pytest.raises(CapacityError) as caught:
        make(**{option: "30MiB"})
    assert caught.value.hint is not None
    make(**{option: caught.value.hint.split()[3]})


def test_what_the_processor_expands_for_a_gpu_is_counted() -> None:
    weight = max(tensor.nbytes for tensor in make_manifest().layout.tensors)
    for widening, more in ((1, 0), (2, 2 * weight)):
        without, with_it = (
            device_plan(8 * GIB, 8 * GIB, widening=widening, computes_on_host=each).host for each in (False, True)
        )
        assert without is not None
        assert with_it is not None
        assert with_it.workspace - without.workspace == more


def test_libraries_take_less_where_they_keep_few_programs_and_beside_a_narrow_model() -> None:
    def fixed(
        hidden: int,
        programs: int = 0,
        *,
        takes_prompts: bool = True,
        threads: int = 1,
        has_tiles: bool = False,
        compiles: bool = False,
        **fields: Any,
    ) -> int:
        shape = dataclasses.replace(SHAPE, hidden=hidden, widest=2 * hidden, vocabulary=0, **fields)
        libraries = Libraries(programs, takes_prompts, takes_prompts, threads, has_tiles, compiles)
        made = make_plan(make_manifest(), shape, available_bytes=8 * GIB, experts="8", context=512, libraries=libraries)
        return made.workspace - made.step_tokens * made.token_workspace

    assert fixed(32) < fixed(256) < fixed(1024)
    for programs in (32, 128):
        assert fixed(256, programs) - fixed(256) == programs * 400 * KIB
    assert fixed(256) < fixed(256, takes_prompts=False)
    assert fixed(4096, 128, takes_prompts=False) == fixed(8192, 128, takes_prompts=False)
    assert fixed(256) < fixed(256, has_plain_attention=False)
    assert fixed(256) < fixed(256, sharing=8)
    assert fixed(256, threads=8) - fixed(256) == 7 * 512 * KIB
    assert fixed(256, compiles=True) - fixed(256) == 96 * MIB
    for hidden, kib in ((256, 0), (512, 0), (768, 256), (1024, 512), (4096, 512)):
        assert fixed(hidden, 128, has_tiles=True) - fixed(hidden, 128) == (128 + 128) * kib * KIB


def test_weights_that_are_widened_are_counted_so() -> None:
    weight = max(tensor.nbytes for tensor in make_manifest().layout.tensors)
    for make in (partial(plan, 8 * GIB), partial(device_plan, 8 * GIB, 8 * GIB)):
        plain, wide = (make(experts="8", context=512, widening=factor) for factor in (1, 2))
        assert wide.dense == 2 * plain.dense
        assert wide.kv_cache == 2 * plain.kv_cache
        assert wide.workspace >= plain.workspace + 2 * weight
        assert wide.slot_bytes == plain.slot_bytes
