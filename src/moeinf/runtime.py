"""What happens when a forward pass reaches an MoE layer: the experts of the step are leased, fetched, computed and
added up.

Owns the cache, the slots and what fetches, and ties them together; one thread calls it, the model's. Decides nothing
that the cache decides and computes nothing that the kernels compute. Rows are added in ascending order of expert
whatever order the experts arrived in, so the result depends on nothing but the input.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from .cache import CacheCounters, ExpertCache, Outcome
from .collection import RequestCounter
from .errors import MoeinfError
from .kernels import ExpertMaths
from .manifest import Manifest
from .memory import return_free_memory
from .misses import HostMisses, HostStep
from .predictors import NoPredictor, Predictor
from .prefetch import PrefetchCounters, Prefetcher, WarmUp, fetch
from .recorder import Recorder
from .steps import OBSERVED_TOKENS, Arrival, Step
from .transfer import Fetcher, Pool, Urgency, is_closed

__all__ = ["ExpertRuntime", "StepStopped"]

STREAM_BYTES = 64 << 20
"""A long prompt passes its experts through slots of about this size together, at least two and at most a quarter of
all slots.
"""


MANY_TOKENS = 32
"""Steps of this many tokens leave holes in the heap that add up to more than all activations, unless they are returned
(docs/experiments.md). It takes 2 to 5 ms per layer."""

_ALL_FETCHED = nullcontext()

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Is told what each call of `ExpertRuntime.forward` is given."""


class StepStopped(Exception):  # noqa: N818  # not an error: somebody asked for it
    """A forward pass was given up between two layers, as `should_stop` asked; the KV cache is then half written."""


@dataclass(slots=True)
class Traffic:
    """What moved since the counters were reset: bytes off the disk, experts that came into a slot, those of them that
    no disk was read for, and seconds in which nothing could be computed for want of them.
    """

    disk_bytes: int = 0
    arrived: int = 0
    unread: int = 0
    stall_s: float = 0.0


class ExpertRuntime:
    """The experts of one loaded model.

    Args:
        manifest: what the model's experts are.
        maths: the experts' functions, one per MoE layer, in the manifest's order.
        cache, pool, fetcher: of the tier that the maths reads, theirs is the bookkeeping, the memory, and bringing
            experts there; `close` ends what fetches, and gives the memory back.
        counter: counts what each request asks for.
        predictors: name the experts to prefetch while decoding; of several, the one that pays best is found by trying,
            and the first of them names none.
        misses: has some experts computed where they are, in place of bringing them; None brings all of them.
    """

    def __init__(
        self,
        manifest: Manifest,
        maths: list[ExpertMaths],
        *,
        cache: ExpertCache,
        pool: Pool,
        fetcher: Fetcher,
        counter: RequestCounter,
        predictors: Mapping[str, Predictor] | None = None,
        misses: HostMisses | None = None,
    ) -> None:
        self.decode, self.prefill, self.traffic = CacheCounters(), CacheCounters(), Traffic()
        self.should_stop: Callable[[], bool] | None = None
        self.recorder: Recorder | None = None
        self.observer: Observer | None = None
        self.counter = counter
        self._is_closed = False
        self._process = os.getpid()
        self._requests = 0
        self._prompt_left, self._is_prompt = 0, False
        self._lent: list[int] = []
        self._computed: list[tuple[int, list[int]]] = []
        """Layers of the token that were computed before anybody was told, and their experts."""
        self._entered: deque[Arrival] = deque()
        """Arrivals that were entered in the cache before the step that may wait for them was told."""
        self.cache = cache
        self._pool = pool
        self._fetcher = fetcher
        self._maths = maths
        self._misses = misses
        self._layers = manifest.layers
        self._sizes = [layer.num_experts for layer in manifest.layers]
        self._first = [sum(self._sizes[:layer]) for layer in range(len(self._sizes))]
        self.spans = [range(first, first + size) for first, size in zip(self._first, self._sizes, strict=True)]
        """Of each layer the numbers of its experts, over all layers."""
        self._prefetcher = Prefetcher(
            predictors or {"off": NoPredictor()},
            cache,
            fetcher,
            self._first,
            0,
        )
        self._fit(cache.num_slots)
        self._warm_up = WarmUp((), cache, fetcher, 0)

    def warm_up(self, experts: Iterable[int]) -> None:
        """Begin to fill empty slots with `experts` (numbers over all layers), the most wanted first, in the
        background. Some slots are left for what is asked for meanwhile.
        """
        spare = self._window + max(layer.top_k for layer in self._layers)
        self._warm_up = WarmUp(experts, self.cache, self._fetcher, spare)

    def begin_request(self, position: int, tokens: int = 0) -> None:
        """A person asks for something: the first token that is new has this position in the conversation, and so many
        are the prompt's, however few of them come at a time.
        """
        self._catch_up()
        self.begin_prompt(tokens)
        self.cache.begin_request()
        self.counter.begin_request()
        if self.recorder is not None:
            self.recorder.begin(self._requests, position)
        self._requests += 1

    def begin_prompt(self, tokens: int) -> None:
        """Of what comes now so many tokens are the request's prompt; of a request that is over, none."""
        self._prompt_left = tokens

    def reset_counters(self) -> None:
        self._catch_up()
        self.decode, self.prefill, self.traffic = CacheCounters(), CacheCounters(), Traffic()
        self.cache.counters = self.prefill
        self._prefetcher.counters = PrefetchCounters()

    @property
    def prefetch(self) -> PrefetchCounters:
        """What the predictor was worth since the counters were reset."""
        return self._prefetcher.counters

    @property
    def predictor(self) -> str:
        """Which predictor is asked now, by its name."""
        return self._prefetcher.way

    @property
    def best_predictor(self) -> str:
        """Which of several predictors was found to be best, "" where that is not known yet."""
        return self._prefetcher.best

    def begin_with(self, predictor: str) -> None:
        """Of several predictors this one was the best before: ask it at first."""
        self._prefetcher.begin_with(predictor)

    def leave_out(self, predictor: str) -> None:
        """Ask this one of several predictors no more."""
        self._prefetcher.leave_out(predictor)

    @property
    def kernels(self) -> str:
        """What computes the experts of a token."""
        found = dict.fromkeys(maths.computed_by for maths in self._maths)
        if self._misses is not None:
            found |= dict.fromkeys(f"{name}, on the processor" for name in self._misses.kernels)
        return "; ".join(found)

    @property
    def lendable_slots(self) -> int:
        """Slots whose memory a long prompt should borrow at most: the empty ones, and a quarter of the others."""
        empty = self.cache.num_free
        return empty + (self.cache.num_usable - empty) // 4

    def lend(self, count: int) -> None:
        """Have `count` slots out of use from now on, and their memory for whoever needs it. What is on its way into
        empty slots makes room; what somebody waits for, or will soon, does not.
        """
        if count == len(self._lent):
            return
        self._catch_up()
        if count > len(self._lent):
            slots = self.cache.lend(count - len(self._lent))
            while len(self._lent) + len(slots) < count and self._makes_room():
                self._entered.append(self._await_arrival())
                slots += self.cache.lend(count - len(self._lent) - len(slots))
            for slot in slots:
                self._pool.release(slot)
            self._lent += slots
        else:
            for maths in self._maths:
                maths.forget()
            return_free_memory()
            self.cache.give_back(self._lent[count:])
            del self._lent[count:]
        self._fit(self.cache.num_usable)

    def _makes_room(self) -> bool:
        """Whether something that nobody waits for has given its slot up, and its arrival will come, now or soon."""
        return self._warm_up.make_room() or self._warm_up.is_any_leaving or bool(self._prefetcher.unsettled)

    def shrink(self, num_slots: int) -> None:
        """Make do with so many slots from now on, no fewer than one layer asks for. What was in any is gone from there.
        To be called between steps. Raises torch.OutOfMemoryError; then there are none, and it may be called again.
        """
        self.lend(0)
        self._settle(())
        self._warm_up.give_up()
        while self._prefetcher.unsettled or self._warm_up.give_up():
            self.wait()
        self._lent = self.cache.lend(self.cache.num_slots)
        self._pool.shrink(num_slots)
        self.cache.give_back([slot for slot in self._lent if slot < num_slots])
        self._lent = []
        self._fit(num_slots)

    def _fit(self, num_slots: int) -> None:
        """Guess and stream no more at a time than so many slots have room for."""
        self._prefetcher.most_guesses = num_slots - max(layer.top_k for layer in self._layers)
        self._window = max(2, min(STREAM_BYTES // self._pool.slot_bytes, num_slots // 4))

    def close(self) -> None:
        """End what brings experts, and give the memory of all slots back. There are no steps any more."""
        self._is_closed = True
        self._fetcher.close()
        self._pool.close()

    def require_open(self) -> None:
        """Raises MoeinfError after `close`, and in a process that was forked since: threads stay behind."""
        if self._is_closed:
            raise is_closed()
        if os.getpid() != self._process:
            raise MoeinfError("the engine belongs to the process that loaded it", hint="load it after the fork")

    def token_enters(self) -> None:
        """One token enters the model's first decoder layer."""
        if self.recorder is not None:
            self.recorder.token_enters()
        self._prefetcher.look_ahead(-1)

    def forward(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The MoE layer's output [tokens, H] for `hidden` [tokens, H] and the router's choice, both [tokens, k].

        Raises what an expert's fetch raised (the path is in the message), or StepStopped.
        """
        self.require_open()
        self._catch_up()
        if layer == 0:
            self._begin_step(len(hidden))
        if self.observer is not None:
            self.observer(layer, hidden, top_k_index, top_k_weights)
        if self.recorder is not None:
            self.recorder.record(layer, top_k_index, top_k_weights, is_prefill=self._is_prompt)
        if hidden.shape[0] == 1:
            experts = top_k_index[0].tolist()
            if len(set(experts)) == len(experts) and max(experts) < self._sizes[layer]:
                return self._forward_token(layer, hidden, experts, top_k_weights)
        elif self.should_stop is not None and self.should_stop():
            raise StepStopped
        return self._forward_tokens(layer, hidden, top_k_index.cpu(), top_k_weights)

    def may_compute(self, layer: int) -> bool:
        """Whether a token's experts may be computed in this layer where the cache has them `resident`, before anybody
        is told which they are: nobody has to know sooner. What follows is `has_computed`, or `forward`.
        """
        if self.observer is not None or self.recorder is not None or self._misses or self._prefetcher.foresees:
            return False
        self.require_open()
        if layer == 0:
            self._settle(())
        return True

    def has_computed(self, layer: int, experts: list[int]) -> None:
        """A token's `experts`, the likeliest first, were there and have been computed. They are counted when the token
        ends: all layers' together take Python less time, which finds more of what it needs in the processor's caches.
        """
        if layer == 0:
            self._begin_step(1)
        self._computed.append((layer, experts))
        if layer + 1 == len(self._layers):
            self._catch_up()

    def _catch_up(self) -> None:
        """Tell everybody what was computed before they were told."""
        for layer, experts in self._computed:
            self.cache.use_residents(sorted(self._tell(layer, experts)))
        self._computed.clear()

    def _begin_step(self, tokens: int) -> None:
        self._is_prompt = tokens > 1 or self._prompt_left > 0
        self._prompt_left -= tokens
        self.cache.counters = self.prefill if self._is_prompt else self.decode

    def _tell(self, layer: int, experts: list[int]) -> list[int]:
        """Tell everybody what a token asks for; returns it, numbered over all layers."""
        first = self._first[layer]
        keys = [first + expert for expert in experts]
        self.cache.observe(layer, [keys])
        self._prefetcher.observe(layer, [experts])
        self.counter.count(layer, experts, 1, is_prefill=self._is_prompt)
        return keys

    def _forward_token(
        self, layer: int, hidden: torch.Tensor, experts: list[int], weights: torch.Tensor
    ) -> torch.Tensor:
        """One token: all its experts are leased at once; those that are here are computed while the others arrive."""
        first = self._first[layer]
        if layer == 0:
            self._prefetcher.begin_token()
        stalled_s = self.traffic.stall_s
        token = self._maths[layer].token(hidden, weights)
        place = {first + expert: number for number, expert in enumerate(experts)}
        self._settle(place)
        self._tell(layer, experts)
        step = Step(self)
        try:
            with self._on_host(layer, hidden, place) if self._misses else _ALL_FETCHED as on_host:
                asked = sorted(place.keys() - on_host.keys if on_host else place)
                here = step.lease(asked)
                if len(here) == len(place):  # the disk is idle
                    self._prefetcher.look_ahead(layer)
                if here:
                    token.compute([place[key] for key in here], [self._tensors(key) for key in here])
                if on_host:  # while the device computes those that it has
                    token.receive([place[key] for key in on_host.keys], on_host.rows())
                if len(here) < len(place):  # until the rest is read there is time to see what these add
                    there = [place[key] for key in (*here, *(on_host.keys if on_host else ()))]
                    self._prefetcher.look_ahead(layer, partial(token.total, there) if there else None)
                for key in step.arriving():
                    token.compute([place[key]], [self._tensors(key)])
        except BaseException:
            self._prefetcher.settle(())
            raise
        finally:
            step.end()
        self._prefetcher.has_run(layer, self.traffic.stall_s - stalled_s)
        output = token.total([place[key] for key in sorted(place)])
        if self.recorder is not None:
            self.recorder.computed(layer, output)
        return output

    @contextmanager
    def _on_host(self, layer: int, hidden: torch.Tensor, asked: Iterable[int]) -> Iterator[HostStep | None]:
        """What the processor computes of a token that has `asked` for these experts, the most preferred first."""
        assert self._misses is not None
        with self._misses.step(layer, hidden, [key for key in asked if self.cache.slot(key) is None]) as step:
            for key in step.keys if step else ():
                self.cache.pass_by(key)
            yield step
            if step is not None and step.behind is not None:
                self._warm_up.add(step.behind)

    def _forward_tokens(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Many tokens: each expert is leased when there is a slot for it, and released as soon as it is computed. The
        index is in host memory.

        The experts of the last token are what decoding is likely to ask for next, and take their place in the cache;
        the others pass through free slots, or through a small window of them.
        """
        maths, first = self._maths[layer], self._first[layer]
        self.cache.counters = self.prefill
        prompt = maths.prompt(hidden, top_k_index, weights, self._sizes[layer])
        kept = {first + expert for expert in top_k_index[-1].tolist()}
        self._settle(())
        last = self._last_rows(layer, top_k_index)
        self.cache.observe(layer, [[first + expert for expert in row] for row in last])
        self._prefetcher.observe(layer, last)
        self.counter.count(layer, top_k_index.flatten().numpy(), len(hidden), is_prefill=True)
        step = Step(self)
        try:
            asked = [first + expert for expert in prompt.experts]
            for keys in step.stream(asked, kept, self._window, maths.most_at_once):
                prompt.compute([key - first for key in keys], [self._tensors(key) for key in keys])
        finally:
            step.end()
        if len(hidden) >= MANY_TOKENS and hidden.device.type == "cpu":
            return_free_memory()
        return prompt.total()

    def _last_rows(self, layer: int, top_k_index: torch.Tensor) -> list[list[int]]:
        """What the last tokens of a prompt chose; a number past the last expert stands for "none"."""
        size = self._sizes[layer]
        return [[expert for expert in row if expert < size] for row in top_k_index[-OBSERVED_TOKENS:].tolist()]

    # What a step does to the cache, the slots and what fetches.

    def lease(self, key: int, *, keep: bool) -> Outcome | None:
        """Lease an expert, and fetch it on a miss; None if no slot can be had now."""
        if self.cache.slot(key) is None and self._warm_up.make_room():
            self._entered += self._enter_arrivals()
        while self._warm_up.is_leaving(key) or key in self._prefetcher.unsettled:
            self._entered.append(self._await_arrival())
        while (leased := self.cache.acquire(key, keep=keep)) is None and (
            self._prefetcher.unsettled or self._warm_up.give_up()
        ):
            self._entered.append(self._await_arrival())
        if leased is None:
            return None
        slot, outcome = leased
        if outcome is Outcome.MISS:
            fetch(self.cache, self._fetcher, key, slot, Urgency.DEMAND)
        elif outcome is Outcome.WAIT:
            self._warm_up.keep(key)
            self._fetcher.promote(key)
        return outcome

    def _tensors(self, key: int) -> dict[str, torch.Tensor]:
        slot = self.cache.slot(key)
        assert slot is not None
        return self._pool.tensors(slot)

    def wait(self) -> Arrival:
        """The next arrival, counted and entered in the cache; time spent here is a stall."""
        while self._entered:
            arrival = self._entered.popleft()
            if self._is_news(arrival):
                return arrival
        return self._await_arrival()

    def _is_news(self, arrival: Arrival) -> bool:
        """Whether it still says how things are: what has gone since may be on its way once more."""
        if arrival.error is None and not arrival.cancelled:
            return self.cache.is_resident(arrival.key)
        return self.cache.slot(arrival.key) is None

    def _await_arrival(self) -> Arrival:
        arrival = self._fetcher.poll()
        if arrival is None:
            begin = time.perf_counter()
            arrival = self._fetcher.wait()
            self.traffic.stall_s += time.perf_counter() - begin
        self._enter(arrival)
        return arrival

    def _settle(self, chosen: Collection[int]) -> None:
        """Deal with the guesses that were made for this step, now that it is known what it needs."""
        self._enter_arrivals()
        self._entered.clear()
        self._prefetcher.settle(chosen)
        while not self._prefetcher.unsettled.isdisjoint(chosen):
            self.wait()

    def _enter_arrivals(self) -> list[Arrival]:
        """Enter what has arrived, without waiting; returns it."""
        arrivals = []
        while (arrival := self._fetcher.poll()) is not None:
            self._enter(arrival)
            arrivals.append(arrival)
        return arrivals

    def _enter(self, arrival: Arrival) -> None:
        self._prefetcher.ended(arrival)
        self._warm_up.ended(arrival)
        self.traffic.disk_bytes += arrival.read_bytes
        if arrival.error is None and not arrival.cancelled:
            self.traffic.arrived += 1
            self.traffic.unread += not arrival.read_bytes
            self.cache.arrived(arrival.key)
        else:
            self.cache.failed(arrival.key)
