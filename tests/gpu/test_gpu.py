"""What can be known on a GPU alone: exact against transformers there, bytes in their places, memory kept to.

Skipped without one. tests/test_device_exact.py and tests/test_tiers.py have the same on a stand-in, which torch takes
for the machine's accelerator from then on: nothing here may import it.

    python -m pytest -W ignore tests/gpu -m "not long"    # first: a minute or two
    python -m pytest -W ignore tests/gpu -m long          # other dtypes, all policies, compiled layers: half an hour
"""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import moeinf
from families import EVERY_KIND, make_checkpoint
from moeinf.device import CudaDevice, find_device
from moeinf.engine import Engine
from moeinf.errors import CapacityError, UsageError
from moeinf.kvcache import make_cache
from moeinf.metamodel import CACHE
from moeinf.policies import POLICIES
from moeinf.pull import pull
from moeinf.settings import DEFAULT_POLICY, tune_libraries
from moeinf.store import Store
from moeinf.transfer import Urgency
from readers import SlowReader, use_reader
from test_exact import NEW_TOKENS, PROMPT
from twotiers import Bench

tune_libraries()  # transformers attends by what moeinf attends by

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
    pytest.mark.filterwarnings("ignore"),  # what transformers and torch say about families of theirs
]

long = pytest.mark.long

GREEDY = moeinf.Sampling(max_tokens=NEW_TOKENS, temperature=0)


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice(0)


class Expected(NamedTuple):
    """Logits of the prompt, those of its last token behind a KV cache of the others, and greedy tokens."""

    logits: torch.Tensor
    last: torch.Tensor
    tokens: list[int]


def last_logits(model: Any, prompt: torch.Tensor, cache: Any) -> torch.Tensor:
    model(prompt[:, :-1], use_cache=True, **{CACHE: cache})
    logits: torch.Tensor = model(prompt[:, -1:], use_cache=True, **{CACHE: cache}).logits
    return logits


def reference(folder: Path, dtype: torch.dtype) -> Expected:
    """What the checkpoint gives in plain transformers, on the GPU."""
    auto: Any = AutoModelForCausalLM  # untyped
    model = auto.from_pretrained(folder, dtype=dtype, experts_implementation="eager").to("cuda")
    prompt = PROMPT.to("cuda")
    with torch.inference_mode():
        made = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
        last = last_logits(model, prompt, DynamicCache(config=text_config(model)))
        return Expected(model(prompt).logits, last, made[0, PROMPT.shape[1] :].tolist())


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def check(engine: Engine, expected: Expected) -> None:
    with torch.inference_mode():
        prompt = PROMPT.to("cuda")
        assert torch.equal(engine.model(prompt).logits, expected.logits)
        cache = make_cache(text_config(engine.model), engine.plan.context)
        assert torch.equal(last_logits(engine.model, prompt, cache), expected.last)
    engine.generation_config.eos_token_id = None
    assert list(engine.session().generate(PROMPT[0].tolist(), GREEDY).tokens) == expected.tokens
    engine.runtime.cache.check_integrity()


def launch() -> None:
    """One kernel, for which Triton builds a launcher."""
    from moeinf.kernels.triton_maths import add_up

    rows = torch.ones(1, 8, device="cuda")
    assert torch.equal(add_up(rows, torch.zeros(1, 2, dtype=torch.int64, device="cuda")), 2 * rows)


def test_triton_builds_a_launcher() -> None:
    """That takes a C compiler and Python.h."""
    pytest.importorskip("triton")
    launch()


@pytest.fixture(scope="module")
def triton() -> None:
    """Leave a test out that needs Triton where the one above fails."""
    pytest.importorskip("triton")
    try:
        launch()
    except Exception as error:
        pytest.skip(f"Triton launches nothing here: {error}")


DTYPES = [torch.bfloat16, *(pytest.param(dtype, marks=long) for dtype in (torch.float16, torch.float32))]


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_tokens_are_those_of_transformers(
    family: str, dtype: torch.dtype, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_reader(monkeypatch, SlowReader)
    make_checkpoint(family, tmp_path, str(dtype).removeprefix("torch."))
    expected = reference(tmp_path, dtype)
    manifest = pull(str(tmp_path), store=Store(home), name="model").manifest
    fewest = max(layer.top_k for layer in manifest.layers)
    for experts, prefetch in ((str(fewest), "gate"), ("25%", "eam"), ("50%", "auto"), ("100%", "off")):
        with moeinf.load("model", device="cuda", experts=experts, prefetch=prefetch) as engine:
            check(engine, expected)


@pytest.mark.parametrize("prefetch", ["off", "gate", "eam", "auto"])
@pytest.mark.parametrize("policy", [pytest.param(each, marks=[long] * (each != DEFAULT_POLICY)) for each in POLICIES])
def test_no_policy_and_no_guess_changes_the_output(
    policy: str, prefetch: str, tiny: str, tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_reader(monkeypatch, SlowReader)
    expected = reference(tiny_home.parent / "checkpoint", torch.bfloat16)
    for experts in ("2", "40%"):
        for _ in range(2):
            with moeinf.load(tiny, device="cuda", experts=experts, policy=policy, prefetch=prefetch) as engine:
                check(engine, expected)


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.parametrize(
    ("kernels", "compile_"),
    [("triton", "off"), pytest.param("auto", "on", marks=long), pytest.param("triton", "on", marks=long)],
)
@pytest.mark.usefixtures("triton")
def test_what_rounds_otherwise_gives_nearly_the_same(
    kernels: str, compile_: str, family: str, home: Path, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path, "float32")
    logits = reference(tmp_path, torch.float32).logits
    pull(str(tmp_path), store=Store(home), name="model")
    for experts in ("50%", "100%"):
        options = {"device": "cuda", "experts": experts, "kernels": kernels, "compile": compile_}
        with moeinf.load("model", **options) as engine, torch.inference_mode():  # type: ignore[arg-type]
            assert torch.allclose(engine.model(PROMPT.to("cuda")).logits, logits, rtol=1e-3, atol=1e-3)
            engine.generation_config.eos_token_id = None
            tokens = engine.session().generate(PROMPT[0].tolist(), GREEDY).tokens
            assert len(tokens) == NEW_TOKENS


@pytest.fixture
def bench(tmp_path: Path, device: CudaDevice) -> Iterator[Bench]:
    made = Bench(tmp_path, device, 3)
    yield made
    made.tier.close()


def test_experts_arrive_whole_whatever_the_order(bench: Bench) -> None:
    chance = random.Random(0)
    for _ in range(300):
        keys = chance.sample(range(12), 6)
        for slot, key in enumerate(keys):
            bench.tier.fetch(key, slot, chance.choice(list(Urgency)))
        for _ in keys:
            arrival = bench.tier.wait()
            assert bench.holds(keys.index(arrival.key), arrival.key)
        bench.tier.check_integrity()


def is_pinned(memory: torch.Tensor) -> bool:
    """What CUDA says, whatever else torch may take for the accelerator."""
    return memory.is_pinned("cuda")


def test_host_memory_is_pinned(bench: Bench) -> None:
    assert bench.tier.is_pinned
    assert is_pinned(bench.tier.pool.bytes)
    bench.tier.close()
    assert not is_pinned(bench.tier.pool.bytes)


def test_a_slot_is_not_overwritten_while_it_is_read(device: CudaDevice) -> None:
    """A long queue of maths reads the slot; a copy that is asked for behind it comes after all of it."""
    slot = torch.empty(1 << 22, dtype=torch.float32, device=device.place)
    source = torch.full((1 << 22,), 7.0, pin_memory=True)
    assert is_pinned(source)
    work = torch.randn(4096, 4096, device=device.place)
    for products in (1, 40):  # the first time kernels are loaded, which the host may wait for
        slot.fill_(1)
        torch.cuda.synchronize()
        for _ in range(products):
            work = work @ work
            work /= work.norm()
        read = slot.clone()
        event = device.copy(slot, source)
        was_under_way = not event.query()
        event.synchronize()
        assert bool((read == 1).all())
        assert bool((slot == 7).all())
    assert was_under_way


def test_a_copy_goes_beside_the_maths(device: CudaDevice) -> None:
    """What is asked of the device after a copy does not wait for it, nor the copy for that."""
    nbytes = 1 << 30
    slot = torch.empty(nbytes, dtype=torch.uint8, device=device.place)
    source = torch.full((nbytes,), 7, dtype=torch.uint8, pin_memory=True)
    assert is_pinned(source)
    small = torch.zeros(1, device=device.place)
    for _ in range(2):  # the first time kernels are loaded, which the host may wait for
        torch.cuda.synchronize()
        copied = device.copy(slot, source)
        small += 1
        torch.cuda.current_stream().record_event().synchronize()
        was_under_way = not copied.query()
        copied.synchronize()
    assert was_under_way
    assert small.item() == 2
    assert bool((slot == 7).all())
    assert nbytes / 1e12 < copied.seconds() < 10


@pytest.mark.parametrize("miss", ["host", "auto"])
def test_a_token_of_the_processor_s_experts_is_nearly_that_of_the_gpu_s_own(miss: str, tiny: str) -> None:
    """They round sums of products differently: where both are gone, logits differ in their last bits."""
    token, results = PROMPT[:, :1].to("cuda"), []
    for way in ("fetch", miss):
        with moeinf.load(tiny, device="cuda", experts="2", prefetch="off", miss=way) as engine, torch.inference_mode():
            engine.model(PROMPT.to("cuda"))  # host memory has its experts from now on
            for _ in range(20):
                logits = engine.model(token).logits
            results.append(logits.float())
            experts = engine.stats().experts
            assert experts.hits + experts.misses == experts.requests
            assert (experts.computed_on_host > 0) == (way != "fetch")
            engine.runtime.cache.check_integrity()
            engine.runtime._fetcher.check_integrity()  # type: ignore[attr-defined]
    assert (results[0] - results[1]).abs().max() <= 0.02 * results[0].abs().max()


@pytest.mark.usefixtures("device")
def test_the_budget_is_kept(tiny: str) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with moeinf.load(tiny, device="cuda", experts="40%") as engine:
        engine.session().generate(PROMPT[0].tolist() * 5, moeinf.Sampling(max_tokens=100))
        assert torch.cuda.max_memory_allocated() - before <= engine.plan.total
        assert engine.stats().memory.peak_device == torch.cuda.max_memory_allocated()


def test_closing_gives_everything_back(tiny: str) -> None:
    def load() -> None:
        with moeinf.load(tiny, device="cuda") as engine:
            engine.session().generate([5, 6, 7], GREEDY)

    load()
    gc.collect()
    threads, held = threading.active_count(), torch.cuda.memory_allocated()
    for _ in range(3):
        load()
        gc.collect()
    assert threading.active_count() == threads
    assert torch.cuda.memory_allocated() <= held


def test_what_is_not_there_is_refused(tiny: str) -> None:
    with pytest.raises(UsageError, match="--device cuda:99 is not there"):
        find_device("cuda:99")
    with pytest.raises(CapacityError, match="of the GPU's memory are free"):
        moeinf.load(tiny, device="cuda", device_memory="10000GiB")


def test_memory_that_somebody_else_takes_meanwhile_costs_slots(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with moeinf.load(tiny, device="cuda", experts="8") as engine:
        expected = engine.session().generate(PROMPT[0].tolist(), GREEDY).tokens
        allocated = torch.cuda.memory_allocated() / torch.cuda.get_device_properties(0).total_memory
        try:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(allocated)
            try:
                tokens = engine.session().generate(PROMPT[0].tolist(), GREEDY).tokens
            except CapacityError:
                return  # not even half of the slots made enough room
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert tokens == expected
