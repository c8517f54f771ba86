"""What `run` and `chat` share: a loaded engine, Ctrl-C while it answers, and what is said after an answer."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING

import moeinf
from moeinf import demo
from moeinf.errors import MoeinfError
from moeinf.manifest import AS_RELEASED, LOSSLESS
from moeinf.pull import resolve
from moeinf.store import Store
from moeinf.units import format_bytes, format_seconds

from .options import EngineFlags, SamplingFlags
from .output import Output

if TYPE_CHECKING:
    from moeinf.engine import Engine
    from moeinf.generation import Completion, Sampling
    from moeinf.ledger import MemoryPlan
    from moeinf.stats import ExpertStats, PrefetchStats, Stats

__all__ = ["Interrupts", "describe_cut", "describe_plan", "describe_stats", "open_engine"]

_TWICE_S = 1.0


class Interrupts:
    """Ctrl-C as a person means it: once, stop the answer; twice within a second, leave."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = -math.inf

    def press(self) -> bool:
        """Take note of a Ctrl-C; whether it is the second within a second."""
        before, self._last = self._last, self._clock()
        return self._last - before <= _TWICE_S

    @contextmanager
    def watch(self) -> Iterator[Callable[[], bool]]:
        """While this is open, the first Ctrl-C makes the given function true and the second raises KeyboardInterrupt.

        A process that was started to ignore Ctrl-C goes on ignoring it.
        """
        stopping = False

        def stop(_signal: int, _frame: FrameType | None) -> None:
            nonlocal stopping
            if self.press() or stopping:
                raise KeyboardInterrupt
            stopping = True

        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, stop)
        try:
            yield lambda: stopping
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def open_engine(
    model: str, engine_flags: EngineFlags, sampling_flags: SamplingFlags, output: Output
) -> Iterator[tuple[str, Engine, Sampling]]:
    """The stored name of `model`, its engine, and how to sample. Warns when the cache is too small to help."""
    with output.leaving_at_once():
        stored = resolve(model, Store(), output)
        name = stored.name
        if stored.manifest.source.repo == demo.NAME:
            output.note(demo.NOTE)
        if stored.manifest.layout.quantization is not None and not stored.manifest.layout.is_exact:
            output.note(
                f"{name} has {stored.manifest.layout.quantization.text}: it does not answer exactly as released"
            )
        options = engine_flags.resolve()
        with output.busy(f"loading {name}"):
            sampling = sampling_flags.resolve()
            engine = moeinf.load(name, **asdict(options))
    with engine:
        plan = engine.plan
        if plan.thrashes:
            asked = plan.token_experts
            output.warn(
                f"{plan.last_slots} experts fit and one token asks for {asked}: hardly any is found in memory"
                f" (--experts {asked} would help)"
            )
        told = len(engine.notes)
        for note in engine.notes:
            output.warn(note)
        yield name, engine, sampling
        for note in engine.notes[told:]:
            output.warn(note)
        try:
            engine.save_collection()
        except MoeinfError as error:
            output.warn(f"what was learned about {name} is not saved: {error}")


def describe_plan(plan: MemoryPlan) -> str:
    """Which regime the engine is in."""
    if plan.regime == "resident":
        return f"all {plan.all_experts:,} experts in {'GPU ' if plan.host else ''}memory"
    held = f"{plan.most_slots:,} of {plan.all_experts:,} experts in {'GPU ' if plan.host else ''}memory"
    if plan.most_slots > plan.last_slots:
        held += f" ({plan.last_slots:,} when the context is full)"
    if plan.regime == "host-cached":
        return f"{held}, and all of them in host memory"
    behind = f", {plan.host.slots:,} in host memory" if plan.host else ""
    return f"{held}{behind}, the others are read from disk when asked for"


def describe_stats(stats: Stats) -> list[str]:
    """What an answer cost, in lines."""
    experts = stats.experts
    times = (
        f"time to first token {format_seconds(stats.ttft_s)} · prompt {stats.prefill_tokens_per_s:.1f} tokens/s"
        f" · answer {stats.decode_tokens_per_s:.1f} tokens/s"
    )
    return [
        times if stats.ttft_s else "no token was made",
        f"expert hit rate {experts.hit_rate:.1%} of {experts.decode_requests:,} in {experts.slots:,}"
        f" {'device' if experts.host_slots else 'host'} slots{_describe_host(experts)}"
        f" · disk to host {format_bytes(stats.bytes.disk_to_host)}"
        f" · host to device {format_bytes(stats.bytes.host_to_device)} · stalled {format_seconds(stats.stall_s)}",
        *_describe_prefetch(stats.prefetch),
        *_describe_quantization(stats),
    ]


def _describe_host(experts: ExpertStats) -> str:
    """How often host memory had what a GPU lacked, and how often that was computed there."""
    if not experts.host_slots:
        return ""
    computed = f", {experts.computed_on_host:,} computed by the processor" if experts.computed_on_host else ""
    if not experts.fetched:
        return computed
    share = experts.fetched_from_host / experts.fetched
    return f", {share:.1%} of {experts.fetched:,} in {experts.host_slots:,} host slots{computed}"


def _describe_quantization(stats: Stats) -> list[str]:
    if not stats.quantization:
        return []
    lines = [f"{stats.quantization}, computed by {stats.kernels}"]
    if AS_RELEASED in stats.quantization or LOSSLESS in stats.quantization:
        return lines
    return [*lines, stats.quality.text if stats.quality else "quality not measured (moeinf quality)"]


def _describe_prefetch(prefetch: PrefetchStats) -> list[str]:
    if not prefetch.recall:
        return []
    line = (
        f"prefetch named {prefetch.recall:.0%} of what was asked for, {prefetch.precision:.0%} of it right"
        f" · read {format_bytes(prefetch.read_bytes)}, {format_bytes(prefetch.wasted_bytes)} in vain"
    )
    return [line + (" · off at the end: it did not pay" if prefetch.predictor == "off" else "")]


def describe_cut(
    completion: Completion, sampling: Sampling, context: int, max_context: int, setter: str = "--max-tokens"
) -> str | None:
    """Why an answer ends in the middle and what to do, or None if it does not. The model was made for a context of
    `max_context` tokens; `setter` is what sets how many an answer has.
    """
    if completion.finish_reason != "length":
        return None
    if len(completion.tokens) == sampling.max_tokens:
        return f"the answer was cut at {sampling.max_tokens} tokens; {setter} sets that"
    what = "--context sets that" if context < max_context else "the model was made for no more"
    return f"the answer was cut where the context of {context} tokens was full; {what}"
