"""Loading and unloading: what is refused, what is kept to, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

import moeinf
from families import make_checkpoint
from moeinf import engine as engine_module
from moeinf import placement as placement_module
from moeinf.errors import CapacityError, IntegrityError, ModelNotFoundError, MoeinfError, UsageError
from moeinf.kernels import is_native_exactly
from moeinf.kernels.native import may_compute_any_rows
from moeinf.manifest import expert_path
from moeinf.pull import pull
from moeinf.settings import FEW_PROGRAMS, MANY_PROGRAMS
from moeinf.store import Store
from moeinf.transfer import READERS, can_read_direct
from readers import count_threads

MIB = 1 << 20

STATS_OF_THE_CONTRACT = {
    "load_s": 0.0,
    "ttft_s": 0.0,
    "tpot_s": 0.0,
    "prefill_tokens_per_s": 0.0,
    "decode_tokens_per_s": 0.0,
    "experts": {
        "slots": 0,
        "requests": 0,
        "hits": 0,
        "waits": 0,
        "misses": 0,
        "hit_rate": 0.0,
        "prefetched": 0,
        "prefetch_used": 0,
        "evictions": 0,
    },
    "bytes": {"disk_to_host": 0, "host_to_device": 0},
    "stall_s": 0.0,
    "memory": {"budget": 0, "dense": 0, "kv_cache": 0, "workspace": 0, "experts": 0, "peak_rss": 0},
}


def shape_of(value: object) -> object:
    """Keys and types, without values."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    return type(value)


def is_within(contract: object, found: object) -> bool:
    if isinstance(contract, dict) and isinstance(found, dict):
        return all(key in found and is_within(value, found[key]) for key, value in contract.items())
    return contract == found


def test_stats_have_the_promised_keys(tiny: str) -> None:
    with moeinf.load(tiny) as engine:
        stats = engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=3)).stats.to_dict()
    assert is_within(shape_of(STATS_OF_THE_CONTRACT), shape_of(stats))
    assert json.loads(json.dumps(stats)) == stats


@pytest.mark.parametrize("shows_bars", [True, False])
def test_transformers_is_as_talkative_afterwards_as_before(shows_bars: bool, tiny: str) -> None:
    logs: Any = transformers.logging  # half of it is untyped
    level, showed_bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    try:
        logs.set_verbosity_info()
        (logs.enable_progress_bar if shows_bars else logs.disable_progress_bar)()
        with moeinf.load(tiny):
            assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == (logs.INFO, shows_bars)
    finally:
        logs.set_verbosity(level)
        (logs.enable_progress_bar if showed_bars else logs.disable_progress_bar)()


def test_no_expert_is_read_at_load(tiny: str) -> None:
    with moeinf.load(tiny) as engine:
        assert engine.runtime.cache.num_free == engine.plan.slots
        assert engine.stats().bytes.disk_to_host == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, UsageError, "--device tpu is not known"),
        ({"device": "cuda:x"}, UsageError, "--device cuda:x is not known"),
        ({"device_memory": "1GB"}, UsageError, "--device-memory bounds a GPU's memory"),
        ({"policy": "psychic"}, UsageError, "policy 'psychic' is not known"),
        ({"prefetch": "some"}, UsageError, "--prefetch some is not known"),
        ({"miss": "copy"}, UsageError, "--miss copy is not known"),
        ({"miss": "auto"}, UsageError, "--miss auto is about experts that a GPU lacks, and none is used"),
        ({"kernels": "cuda"}, UsageError, "--kernels cuda is not known"),
        ({"experts": "1"}, CapacityError, "below what one layer asks for"),
        ({"host_memory": "1MB"}, CapacityError, "the budget is 977 KiB"),
        ({"host_memory": "lots"}, UsageError, "is not a size"),
        ({"context": 100000}, UsageError, "is more than the 256 tokens"),
        ({"threads": 0}, UsageError, "--threads must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(tiny: str, options: dict[str, str], error: type[MoeinfError], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(error, match=message):
        moeinf.load(tiny, **options)  # type: ignore[arg-type]
    assert threading.active_count() == before
    with Store().hold(tiny):  # nobody holds it any more
        pass


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelNotFoundError):
        moeinf.load("nothing-of-the-kind")


def test_closing_ends_threads_and_gives_up_the_lock(tiny: str) -> None:
    moeinf.load(tiny).close()  # what libraries start once, they have started
    before = int(psutil.Process().num_threads())
    engine = moeinf.load(tiny)
    assert psutil.Process().num_threads() >= before + READERS
    engine.close()
    engine.close()
    assert count_threads(before) <= before


def test_a_model_in_use_cannot_be_removed(tiny: str) -> None:
    with moeinf.load(tiny), pytest.raises(MoeinfError, match="tiny"):
        Store().remove(tiny)
    assert Store().names() == [tiny]


@pytest.mark.parametrize(
    "damage", ["dense.safetensors", expert_path(0, 0), "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_damaged_store_is_an_integrity_error_that_names_the_file(damage: str, home: Path, tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path)
    stored = pull(str(tmp_path), store=Store(home), name="model")
    path = stored.path / damage
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(IntegrityError, match="model"), moeinf.load("model", experts="2") as engine:
        engine.session().generate(list(range(5, 60)), moeinf.Sampling(max_tokens=4, temperature=0))


def test_the_model_s_generation_config_is_used(home: Path, tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "do_sample": true, "temperature": 0.5}')
    pull(str(tmp_path), store=Store(home), name="model")
    with moeinf.load("model") as engine:
        assert engine.stop_tokens == {7, 9}
        assert engine.model.generation_config is not None
        assert engine.model.generation_config.temperature == 0.5


def test_threads_are_bounded(tiny: str) -> None:
    before = torch.get_num_threads()
    try:
        with moeinf.load(tiny, threads=2):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("options", "programs"), [({}, FEW_PROGRAMS), ({"kernels": "torch"}, MANY_PROGRAMS)])
def test_few_programs_are_planned_for_where_the_library_takes_prompts(
    tiny: str, options: dict[str, str], programs: int
) -> None:
    if not may_compute_any_rows(Store().open(tiny).manifest.layout):
        programs = MANY_PROGRAMS
    with moeinf.load(tiny, **options) as engine:  # type: ignore[arg-type]
        assert engine.plan.libraries.programs == programs
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(programs)


def test_libraries_are_told_what_to_keep_before_the_first_product(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the trial whether the library adds up as torch does. Later they would not hear it."""
    told = []

    def try_a_product(kernels: str) -> bool:
        told.append("ONEDNN_PRIMITIVE_CACHE_CAPACITY" in os.environ)
        return is_native_exactly(kernels)

    monkeypatch.setattr(placement_module, "is_native_exactly", try_a_product)
    with moeinf.load(tiny):
        assert told == [True]


@pytest.mark.parametrize(
    ("family", "programs"), [("mixtral", FEW_PROGRAMS), ("aria_text", MANY_PROGRAMS), ("qwen4_exp_text", MANY_PROGRAMS)]
)
def test_many_programs_are_kept_for_experts_that_torch_computes_and_for_other_kinds_of_attention(
    tmp_path: Path, family: str, programs: int
) -> None:
    make_checkpoint(family, tmp_path / family)
    pull(str(tmp_path / family), store=Store(), name=family)
    if not may_compute_any_rows(Store().open(family).manifest.layout):
        pytest.skip("torch computes all prompts here")
    with moeinf.load(family) as engine:
        assert engine.plan.libraries.programs == programs


def test_float32_needs_no_programs(tiny: str) -> None:
    with moeinf.load(tiny, dtype="float32") as engine:
        assert engine.plan.libraries.programs == 0
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ


@pytest.mark.parametrize("kind", ["direct", "buffered"])
def test_both_ways_of_reading_give_the_same_tokens(tiny: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "direct" and not can_read_direct(Store().path(tiny) / expert_path(0, 0)):
        pytest.skip("this file system has no direct reads")
    greedy = moeinf.Sampling(max_tokens=16, temperature=0)
    with moeinf.load(tiny) as engine:
        tokens = engine.session().generate(list(range(5, 40)), greedy).tokens
    monkeypatch.setattr(engine_module, "can_cache_files", lambda *_: kind != "direct")
    with moeinf.load(tiny, experts="4") as engine:
        assert engine.session().generate(list(range(5, 40)), greedy).tokens == tokens


MEMORY_PROGRAM = """
import sys, moeinf, torch
torch.set_num_threads(2)
with moeinf.load(sys.argv[1], host_memory=sys.argv[2], kernels="torch", context=2048) as engine:
    engine.generation_config.eos_token_id = None
    session = engine.session()
    ids = torch.randint(5, 4000, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    first = session.generate(ids, moeinf.Sampling(max_tokens=8, temperature=0))
    stats = session.generate([*ids, *first.tokens, *ids[:300]], moeinf.Sampling(max_tokens=8, temperature=0)).stats
    print(stats.memory.peak_rss - stats.memory.libraries, stats.memory.budget, engine.plan.slots)
"""


def measure_memory(model: str, budget: str) -> list[int]:
    """Bytes that a process held in which the model read a prompt of 1500 tokens and one of 300 more, its budget, and
    its slots.
    """
    program = [sys.executable, "-c", MEMORY_PROGRAM, model, budget]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_the_process_stays_within_its_budget(home: Path, tmp_path: Path) -> None:
    """A model of 240 MiB of experts in a budget of 230 MiB with its KV cache, or more."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim comes from a base class without types
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=4,
        dtype="bfloat16",
    )
    auto: object = AutoModelForCausalLM
    auto.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)  # type: ignore[attr-defined]
    from families import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    pull(str(tmp_path), store=Store(home), name="model")
    used, budget, slots = measure_memory("model", "230MiB")
    assert 100 * MIB < used <= budget == 230 * MIB
    assert slots < 128


def test_a_process_with_a_narrow_model_stays_within_its_budget(home: Path) -> None:
    """The demo model with every expert in memory, where programs of matrix products are most of what is held."""
    used, budget, slots = measure_memory("demo", "131MiB")
    assert 30 * MIB < used <= budget == 131 * MIB
    assert slots == 192


def collection_file(tiny_home: Path) -> Path:
    return tiny_home / "models/tiny/traces/collection.safetensors"


def test_what_requests_used_is_kept_for_the_next_start(tiny: str, tiny_home: Path) -> None:
    sampling = moeinf.Sampling(max_tokens=9, temperature=0)
    for number in (1, 2):
        with moeinf.load(tiny, experts="50%") as engine:
            assert engine.notes == ()
            assert len(engine.runtime.counter.collection) == number - 1
            engine.generation_config.eos_token_id = None
            engine.session().generate([5, 6, 7], sampling)
        with moeinf.load(tiny) as engine:
            matrices = engine.runtime.counter.collection.matrices
            assert len(matrices) == number
            assert matrices[-1].sum(axis=2).tolist() == [[6, 6], [16, 16]]  # 3 tokens read, 8 made and read, k = 2


def test_a_prompt_of_one_token_is_learned_as_a_prompt(tiny: str) -> None:
    with moeinf.load(tiny) as engine:
        engine.generation_config.eos_token_id = None
        engine.session().generate([5], moeinf.Sampling(max_tokens=9, temperature=0))
        engine.save_collection()
        matrix = engine.runtime.counter.collection.matrices[-1]
        assert matrix.sum(axis=2).tolist() == [[2, 2], [16, 16]]  # a token read, 8 made and read, k = 2


def test_only_what_is_asked_while_it_learns_is_learned(tiny: str) -> None:
    with moeinf.load(tiny) as engine:
        engine.generation_config.eos_token_id = None
        for learns in (False, True, False):
            engine.learns = learns
            engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=9, temperature=0))
    with moeinf.load(tiny) as engine:
        assert engine.learned_requests == 1


def test_what_two_at_a_time_learned_is_kept_together(tiny: str) -> None:
    sampling = moeinf.Sampling(max_tokens=9, temperature=0)
    with moeinf.load(tiny) as one, moeinf.load(tiny) as other:
        for engine, prompt in ((one, [5, 6, 7]), (other, [8, 9]), (one, [10, 11, 12, 13])):
            engine.generation_config.eos_token_id = None
            engine.session().generate(prompt, sampling)
        one.save_collection()
        other.save_collection()
        assert (one.learned_requests, other.learned_requests) == (2, 3)
    with moeinf.load(tiny) as engine:
        matrices = engine.runtime.counter.collection.matrices
        assert [int(matrix[0, 0].sum()) for matrix in matrices] == [6, 8, 4]  # k = 2 for each token of a prompt


def test_a_collection_that_cannot_be_used_is_named_and_replaced(tiny: str, tiny_home: Path) -> None:
    path = collection_file(tiny_home)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"nonsense")
    with moeinf.load(tiny) as engine:
        assert engine.notes == (f"{path} is not a sound safetensors file: {engine.notes[0].partition(': ')[2]}",)
        assert engine.notes[0].endswith("; what is learned now will replace it")
        engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=9, temperature=0))
    with moeinf.load(tiny) as engine:
        assert engine.notes == ()


def test_a_folder_that_cannot_be_written_costs_the_lesson_and_nothing_else(tiny: str, tiny_home: Path) -> None:
    collection_file(tiny_home).parent.write_text("no folder")
    try:
        with moeinf.load(tiny) as engine:
            engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=9, temperature=0))
            with pytest.raises(UsageError, match="no access to"):
                engine.save_collection()
            engine.session().generate([5, 6, 7], moeinf.Sampling(max_tokens=9, temperature=0))
    finally:
        collection_file(tiny_home).parent.unlink()
