"""What a step does to cache and disk: reads nothing twice, spares what decoding uses, and survives every failure."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moeinf
from families import make_checkpoint
from moeinf import hooks
from moeinf.engine import Engine
from moeinf.errors import IntegrityError, MoeinfError
from moeinf.manifest import expert_path
from moeinf.prefetch import Prefetcher, WarmUp
from moeinf.pull import pull
from moeinf.steps import Step
from moeinf.store import Store
from moeinf.transfer import SlotPool
from readers import FailingReader, RecordingReader, SlowReader, StuckReader, use_reader

GREEDY = moeinf.Sampling(max_tokens=12, temperature=0)
PROMPT = torch.randint(5, 100, (200,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def wide_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`wide`: 3 layers of 32 experts, 2 per token, so that a long prompt asks for more experts than there are slots."""
    from families import FAMILIES

    folder = tmp_path_factory.mktemp("wide")
    original = FAMILIES["qwen3_moe"]

    def widened() -> Any:
        config = original()
        config.num_local_experts, config.num_hidden_layers, config.mlp_only_layers = 32, 3, []
        return config

    FAMILIES["qwen3_moe"] = widened
    try:
        make_checkpoint("qwen3_moe", folder / "checkpoint")
    finally:
        FAMILIES["qwen3_moe"] = original
    pull(str(folder / "checkpoint"), store=Store(folder / "home"), name="wide")
    return folder / "home"


@pytest.fixture
def wide(wide_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MOEINF_HOME", str(wide_home))
    yield "wide"
    shutil.rmtree(wide_home / "models/wide/traces", ignore_errors=True)


def run(engine: Engine, prompt: list[int] | None = None) -> tuple[int, ...]:
    engine.generation_config.eos_token_id = None
    return engine.session().generate(prompt or PROMPT, GREEDY).tokens


def resident(engine: Engine) -> set[int]:
    return {expert for expert in range(engine.manifest.num_experts) if engine.runtime.cache.is_resident(expert)}


@pytest.mark.parametrize("experts", ["2", "10", "30", "96"])
def test_a_long_prompt_reads_each_expert_once_at_most(wide: str, experts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = use_reader(monkeypatch, RecordingReader)
    with moeinf.load(wide, experts=experts) as engine, torch.inference_mode():
        engine.model(torch.tensor([PROMPT]))
        fetched = readers[-1].fetched
        assert len(fetched) == len(set(fetched)) > 60
        assert engine.runtime.prefill.misses == len(fetched)
        assert engine.runtime.decode.requests == 0


def test_a_long_prompt_leaves_what_decoding_uses(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeinf.runtime.STREAM_BYTES", 1)
    with moeinf.load(wide, experts="48", prefetch="off") as engine:
        run(engine, PROMPT[:3])
        for start in range(0, 150, 3):  # fill the cache with what decoding asks for
            run(engine, PROMPT[start : start + 3])
        before = resident(engine)
        assert len(before) == 48
        with torch.inference_mode():
            engine.model(torch.tensor([PROMPT]))
        window, last_token = 2 + 1, 3 * 2
        assert len(before - resident(engine)) <= window + last_token


@pytest.mark.parametrize("fails", [False, True])
def test_a_long_prompt_borrows_slots_and_gives_them_back(wide: str, fails: bool) -> None:
    with moeinf.load(wide, experts="20", context=256) as engine, torch.inference_mode():
        nothing_to_spare = str(engine.plan.total)
        expected = engine.model(torch.tensor([PROMPT])).logits
    with moeinf.load(wide, experts="20", context=256, host_memory=nothing_to_spare) as engine:
        runtime, lent = engine.runtime, []
        lend = runtime.lend

        def spy(count: int) -> None:
            lend(count)
            lent.append(count)
            runtime.cache.check_integrity()

        def interrupted(*_: object) -> torch.Tensor:
            raise KeyboardInterrupt

        runtime.lend = spy  # type: ignore[method-assign]
        if fails:
            runtime._maths[1].expert = interrupted  # type: ignore[method-assign,assignment]
        assert engine.plan.lent_slots(200, 200) > 20
        with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext(), torch.inference_mode():
            assert torch.equal(engine.model(torch.tensor([PROMPT])).logits, expected)
        assert lent == ([18] if fails else [18, 0])
        if fails:
            del runtime._maths[1].expert
            run(engine, PROMPT[:1])
        assert runtime.cache.num_free + runtime.cache.num_resident == 20
        runtime.cache.check_integrity()


def test_a_conversation_takes_its_room_back_as_it_grows(wide: str) -> None:
    with moeinf.load(wide, experts="20", context=256) as engine:
        expected, budget = run(engine, PROMPT[:20]), str(engine.plan.total)
    with moeinf.load(wide, context=256, host_memory=budget) as engine:
        plan, runtime = engine.plan, engine.runtime
        assert (plan.slots, runtime.cache.num_usable) == (20, plan.most_slots)
        assert plan.most_slots > 22
        session, in_use = engine.session(), []
        engine.generation_config.eos_token_id = None
        said = PROMPT[:20]
        while len(said) < 256:
            greedy = moeinf.Sampling(max_tokens=min(40, 256 - len(said)), temperature=0)
            said = [*said, *session.generate(said, greedy).tokens]
            in_use.append(engine.stats().experts.slots)
            assert in_use[-1] == runtime.cache.num_free + runtime.cache.num_resident <= plan.slots_at(len(said) - 1)
            runtime.cache.check_integrity()
        assert in_use == sorted(in_use, reverse=True)
        assert (in_use[0], in_use[-1]) == (plan.slots_at(59), plan.last_slots)
        assert tuple(said[20:32]) == expected
        session.generate(said[:10], GREEDY)  # what was cut off may be held still
        assert runtime.cache.num_usable == plan.last_slots
        session.clear()
        session.generate(said[:10], GREEDY)
        assert runtime.cache.num_usable == plan.slots_at(21) > plan.last_slots


def test_a_prompt_takes_back_what_experts_have_between_prompts(wide: str) -> None:
    with moeinf.load(wide, experts="20", context=256) as engine:
        budget = str(engine.plan.total)
    with moeinf.load(wide, context=256, host_memory=budget) as engine, torch.inference_mode():
        runtime, seen, forgotten = engine.runtime, [], []
        runtime.observer = lambda _layer, hidden, *_: seen.append((len(hidden), runtime.cache.num_usable))
        runtime._maths[0].forget = lambda: forgotten.append(runtime.cache.num_usable)  # type: ignore[method-assign]
        for tokens in (60, 1, 2):
            engine.model(torch.tensor([PROMPT[:tokens]]))
            assert runtime.cache.num_usable == engine.plan.most_slots > 40
        last = engine.plan.last_slots  # how much of the context another's cache holds nobody knows
        assert seen == [(60, 20)] * 3 + [(1, last)] * 3 + [(2, 20)] * 3
        assert forgotten == [20, last, 20], "before slots have the memory again"


def test_conversations_side_by_side_each_take_their_room(wide: str) -> None:
    with moeinf.load(wide, experts="20", context=256) as engine:
        budget = str(engine.plan.total)
    with moeinf.load(wide, context=256, host_memory=budget) as engine:
        engine.generation_config.eos_token_id = None
        lent: list[int] = []
        lend = engine.runtime.lend
        engine.runtime.lend = lambda count: (lent.append(count), lend(count))[1]  # type: ignore[method-assign,func-returns-value]
        first, second = engine.session(), engine.session()
        for session, held in ((first, 31), (second, 62), (first, 62)):
            lent.clear()
            session.generate(PROMPT[:20], GREEDY)
            assert lent[2:] == sorted(lent[2:]), "behind the prompt no step gives room back"
            assert engine.runtime.cache.num_usable == engine.plan.slots_at(held)
        assert engine.plan.slots_at(62) < engine.plan.slots_at(31)


def test_of_somebody_s_own_kv_cache_the_whole_room_is_left(wide: str) -> None:
    with moeinf.load(wide, experts="20", context=256) as engine:
        budget = str(engine.plan.total)
    with moeinf.load(wide, context=256, host_memory=budget) as engine, torch.inference_mode():
        counts: list[int] = []
        lend = engine.runtime.lend
        engine.runtime.lend = lambda count: (counts.append(count), lend(count))[1]  # type: ignore[method-assign,func-returns-value]
        engine.model(torch.tensor([PROMPT[:8]]))
        assert counts == [engine.plan.most_slots - 20, 0]


def test_a_prompt_leaves_its_last_token_s_experts_behind(wide: str) -> None:
    with moeinf.load(wide, experts="12") as engine, torch.inference_mode():
        chosen: list[int] = []
        forward = engine.runtime.forward

        def spy(layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            chosen.extend(layer * 32 + expert for expert in index[-1].tolist())
            return forward(layer, hidden, index, weights)

        engine.runtime.forward = spy  # type: ignore[assignment,method-assign]
        engine.model(torch.tensor([PROMPT]))
        assert len(set(chosen)) == 6
        assert set(chosen) <= resident(engine)


def test_a_missing_expert_is_named_and_the_engine_goes_on(wide: str, wide_home: Path) -> None:
    with moeinf.load(wide, experts="8", policy="lru", prefetch="off") as engine:
        tokens = run(engine)
        path = wide_home / "models/wide" / expert_path(1, 5)
        os.rename(path, path.with_suffix(".away"))
        try:
            with pytest.raises(IntegrityError, match=r"L001/E005\.safetensors is missing"):
                run(engine)
        finally:
            os.rename(path.with_suffix(".away"), path)
        engine.runtime.cache.check_integrity()
        assert run(engine) == tokens


@pytest.mark.parametrize("prefetch", ["off", "gate", "eam"])
def test_every_read_may_fail_once(wide: str, prefetch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The N-th expert's file cannot be read, N = 0, 1, 2 … until nothing fails: each time an error with the path, or
    the right answer if that was a guess that nobody needed; then all is well.
    """
    readers = use_reader(monkeypatch, FailingReader)
    with moeinf.load(wide, experts="6", prefetch=prefetch) as engine:
        short = PROMPT[:4]
        expected = run(engine, short)
        reader = readers[-1]
        messages: list[tuple[str, str]] = []
        for number in range(0, 1000, 7):
            reader.fail_at, reader.failed_path = number, None
            try:
                tokens = run(engine, short)
            except MoeinfError as error:
                messages.append((str(reader.failed_path), str(error)))
            else:
                assert tokens == expected
                if reader.failed_path is None:
                    break
                assert prefetch != "off"
            finally:
                reader.fail_at, reader.failed_path = None, None
            engine.runtime.cache.check_integrity()
            engine.runtime._settle(())  # what was foreseen for a token that did not come
            assert all(count == 0 for count in engine.runtime.cache._leases)
            assert run(engine, short) == expected
        assert len(messages) > (5 if prefetch == "off" else 2)
        assert all(message == f"{path} cannot be read: Input/output error" for path, message in messages)
        assert reader.fail_at is None


def test_an_interrupt_in_the_maths_leaves_no_lease(wide: str) -> None:
    with moeinf.load(wide, experts="8") as engine:
        expected = run(engine)
        maths = engine.runtime._maths[1]

        def interrupted(*_: object) -> torch.Tensor:
            raise KeyboardInterrupt

        maths.expert = interrupted  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            run(engine)
        del maths.expert
        assert all(count == 0 for count in engine.runtime.cache._leases)
        engine.runtime.cache.check_integrity()
        assert run(engine) == expected


@pytest.mark.parametrize("prefetch", ["off", "eam"])
def test_ctrl_c_waits_until_nothing_is_half_done(wide: str, prefetch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when a slot has been taken that the step does not know of yet."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with moeinf.load(wide, experts="8", prefetch=prefetch) as engine:
            expected = run(engine, PROMPT[:5])
            acquire = engine.runtime.cache.acquire
            calls = 0

            def interrupted(expert: int, *, keep: bool = True) -> Any:
                nonlocal calls
                calls += 1
                leased = acquire(expert, keep=keep)
                if calls == at:
                    os.kill(os.getpid(), signal.SIGINT)
                return leased

            monkeypatch.setattr(engine.runtime.cache, "acquire", interrupted)
            for at in range(1, 12):
                calls = 0
                with pytest.raises(KeyboardInterrupt):
                    run(engine, PROMPT[:5])
                assert calls >= at
                engine.runtime.cache.check_integrity()
                calls = -1000
                assert run(engine, PROMPT[:5]) == expected
                engine.runtime._settle(())
                assert sum(engine.runtime.cache._leases) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_kept_no_longer_than_a_step_whatever_came_of_it(wide: str) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise MemoryError

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with moeinf.load(wide, experts="8") as engine, torch.inference_mode():
            engine.model(torch.tensor([PROMPT[:5]]))
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            engine.runtime._maths[1].expert = fail  # type: ignore[method-assign,assignment]
            with pytest.raises(MemoryError):
                engine.model(torch.tensor([PROMPT[:5]]))
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_counters_tell_what_happened(wide: str) -> None:
    with moeinf.load(wide, experts="100%") as engine:
        engine.generation_config.eos_token_id = None
        first = engine.session().generate(PROMPT, GREEDY).stats
        again = engine.session().generate(PROMPT, GREEDY).stats
    per_token = 3 * 2
    assert first.experts.decode_requests == again.experts.decode_requests == 11 * per_token
    assert first.experts.hits + first.experts.misses == first.experts.requests
    assert first.bytes.disk_to_host == first.experts.misses * engine.manifest.layout.nbytes > 0
    assert (again.experts.misses, again.experts.hit_rate, again.bytes.disk_to_host) == (0, 1.0, 0)
    assert again.stall_s == 0


def test_evictions_by_a_prompt_count(wide: str) -> None:
    with moeinf.load(wide, experts="8", prefetch="off") as engine:
        experts = engine.session().generate(PROMPT, moeinf.Sampling(max_tokens=1)).stats.experts
        assert experts.decode_requests == 0
        assert experts.evictions >= experts.misses - 8 > 50


def test_each_wait_is_told_once(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ways to foresee are judged by."""
    told: list[float] = []
    monkeypatch.setattr(Prefetcher, "has_run", lambda _, __, stalled_s: told.append(stalled_s))
    use_reader(monkeypatch, SlowReader)
    with moeinf.load(wide, experts="8", prefetch="off", kernels="torch") as engine:
        run(engine, PROMPT[:1])
        assert len(told) == 12 * 3
        assert sum(told) == pytest.approx(engine.stats().stall_s)
        assert sum(told) > 0


@pytest.mark.parametrize("experts", ["10", "50%", "100%"])
def test_a_cache_is_warmed_by_what_earlier_requests_used(
    wide: str, experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the background: what is asked for meanwhile comes first, and the answer is the same."""
    use_reader(monkeypatch, SlowReader)
    with moeinf.load(wide, experts=experts, prefetch="off") as engine:
        expected = run(engine)
        assert engine.runtime.cache.num_resident > 0
    with moeinf.load(wide, experts=experts, prefetch="off") as engine:
        assert engine.runtime.cache.num_free == engine.plan.slots
    with moeinf.load(wide, experts=experts, prefetch="eam") as engine:
        cache = engine.runtime.cache
        spare = engine.runtime._window + 2
        assert cache.num_free == min(engine.plan.slots, spare)
        assert run(engine) == expected
        cache.check_integrity()
        assert run(engine, [*PROMPT[:20], 7, 8]) == run(engine, [*PROMPT[:20], 7, 8])
        assert engine.stats().experts.hits > 0


def test_what_is_needed_now_takes_the_place_of_what_may_be_needed(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that never comes to the warm-up its experts give up their slots, the least wanted first."""
    with moeinf.load(wide, experts="30", prefetch="off") as engine:
        expected = run(engine)
    use_reader(monkeypatch, StuckReader)
    with moeinf.load(wide, experts="30", prefetch="eam") as engine:
        warming = set(engine.runtime._warm_up._unread)
        assert len(warming) == 30 - engine.runtime._window - 2
        assert run(engine) == expected
        assert len(engine.runtime._warm_up._unread) < len(warming)
        engine.runtime.cache.check_integrity()


@pytest.mark.parametrize("kind", [StuckReader, SlowReader])
def test_what_was_given_up_for_others_is_fetched_before_it_is_computed(
    wide: str, kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt that borrows slots makes the warm-up give up experts which the same layer then asks for."""
    for _ in range(2):
        with moeinf.load(wide, experts="20", context=256) as engine, torch.inference_mode():
            expected = engine.model(torch.tensor([PROMPT])).logits
    nothing_to_spare = str(engine.plan.total)
    use_reader(monkeypatch, kind)
    for _ in range(8):
        loaded = moeinf.load(wide, experts="20", context=256, host_memory=nothing_to_spare)
        with loaded as engine, torch.inference_mode():
            assert engine.runtime._warm_up._unread
            assert torch.equal(engine.model(torch.tensor([PROMPT])).logits, expected)
            engine.runtime.cache.check_integrity()


def test_an_expert_that_made_room_and_is_then_asked_for_is_waited_for(
    wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the fetch that was given up says nothing of the one that was begun anew."""
    use_reader(monkeypatch, StuckReader)
    with moeinf.load(wide, experts="4", prefetch="off") as engine:
        runtime = engine.runtime
        runtime._warm_up = WarmUp([7, 6, 5, 9], runtime.cache, runtime._fetcher, 0)
        step = Step(runtime)
        assert step.lease([1, 9]) == []
        assert runtime.cache.slot(5) is None  # 9 gave its slot to 1, and took that of 5
        for key in step.arriving():
            assert runtime.cache.is_resident(key)
        step.end()


def test_a_guess_that_was_given_up_is_asked_for_by_a_prompt(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of its fetch is not the arrival of what the prompt waits for."""
    use_reader(monkeypatch, StuckReader)
    with moeinf.load(wide, experts="4", prefetch="off") as engine:
        runtime = engine.runtime
        runtime._prefetcher._guess([0, 1])
        runtime._settle(())
        assert runtime._prefetcher.unsettled == {0, 1}
        step = Step(runtime)
        for key in itertools.chain.from_iterable(step.stream([0, 1], set(), 2)):
            assert runtime.cache.is_resident(key)
        step.end()
        assert not any(runtime.cache._leases)


def test_a_warm_up_that_somebody_waits_for_makes_no_room(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_reader(monkeypatch, StuckReader)
    with moeinf.load(wide, experts="4", prefetch="off") as engine:
        runtime = engine.runtime
        runtime._warm_up = WarmUp([7, 6, 5, 9], runtime.cache, runtime._fetcher, 0)
        cancelled: list[int] = []
        cancel = runtime._fetcher.cancel

        def spy(key: int) -> None:
            cancelled.append(key)
            cancel(key)

        monkeypatch.setattr(runtime._fetcher, "cancel", spy)
        step = Step(runtime)
        step.lease([9, 1])
        step.end()
        assert cancelled == [5]


def test_a_warm_up_makes_room_for_what_is_lent(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with moeinf.load(wide, experts="60") as engine:
        expected = run(engine)
    use_reader(monkeypatch, StuckReader)
    with moeinf.load(wide, experts="60", prefetch="eam") as engine:
        runtime = engine.runtime
        assert len(runtime._warm_up._unread) > 60 - runtime.lendable_slots
        runtime.lend(runtime.lendable_slots)
        assert runtime.cache.num_usable == 60 - len(runtime._lent) == 60 - 17 - 43 // 4
        runtime.lend(50)
        assert runtime.cache.num_usable == 10
        assert runtime._prefetcher.most_guesses == 10 - 2
        runtime.cache.check_integrity()
        runtime.lend(0)
        assert run(engine) == expected


class _Misleading:
    """Names experts of the first layer that are not here."""

    def __init__(self) -> None:
        self.cache: Any = None

    def observe(self, layer: int, tokens: object) -> None:
        pass

    def predict(self, layer: int, added: object = None) -> list[int]:
        return [] if layer != 2 else [expert for expert in range(31, -1, -1) if self.cache.slot(expert) is None][:6]


def test_a_slot_may_be_lent_while_guesses_are_on_their_way(wide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses have all slots but those of one layer's choice; one of these is then lent, and all guesses are wrong."""

    class Hesitant(SlowReader):
        def _read_piece(self, job: Any, start: int) -> None:
            if job.key < 32:
                time.sleep(0.02)
            super()._read_piece(job, start)

    with moeinf.load(wide, experts="8", prefetch="off") as engine:
        expected = run(engine, PROMPT[:3])
    use_reader(monkeypatch, Hesitant)
    names = _Misleading()
    monkeypatch.setattr(moeinf.engine, "_predictors", lambda *_: {"misleading": names})
    with moeinf.load(wide, experts="8") as engine:
        names.cache = engine.runtime.cache
        engine.model.register_forward_pre_hook(lambda *_: engine.runtime.lend(1))
        monkeypatch.setattr(hooks._Loans, "_lend", lambda *_: None)
        assert run(engine, PROMPT[:3]) == expected
        engine.runtime.cache.check_integrity()


def test_an_engine_that_is_closed_says_so(wide: str) -> None:
    with moeinf.load(wide, experts="4") as engine:
        session = engine.session()
        session.generate(PROMPT[:3], GREEDY)
    with pytest.raises(MoeinfError, match="closed"):
        session.generate(PROMPT[3:9], GREEDY)
    with pytest.raises(MoeinfError, match="closed"):
        engine.model(torch.tensor([PROMPT[:3]]))


def test_closing_gives_memory_back(wide: str) -> None:
    """Whoever still holds the engine."""
    with moeinf.load(wide, experts="4") as engine:
        run(engine, PROMPT[:3])
        assert isinstance(slots := engine.runtime._pool, SlotPool)
        assert slots.bytes.any()
    assert not any(parameter.numel() for parameter in engine.model.parameters())
    if sys.platform == "linux":  # elsewhere it is given back when the system wants it
        assert not slots.bytes.any()
