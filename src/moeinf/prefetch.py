"""Experts fetched before they are asked for.

While one MoE layer is computed, a predictor names the experts that the next one may choose. They are held, and those
that are not here are fetched, behind everything that somebody waits for. When the next layer has chosen, right guesses
become ordinary fetches and wrong ones are given up. Among several predictors, of which one names nothing, the one that
costs least time is found by trying. A cache that begins empty is filled with what past requests used most. Owns the
guesses; the cache, the bytes and what brings them are others'.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from .cache import ExpertCache
from .predictors import Added, NoPredictor, Predictor
from .steps import Arrival
from .transfer import Fetcher, Urgency
from .trials import Trials

__all__ = ["PrefetchCounters", "Prefetcher", "WarmUp", "fetch"]


def fetch(cache: ExpertCache, fetcher: Fetcher, expert: int, slot: int, urgency: Urgency) -> None:
    """Have an expert brought into the slot that the cache gave it, which takes it back if nobody can."""
    try:
        fetcher.fetch(expert, slot, urgency)
    except BaseException:
        cache.failed(expert)
        raise


@dataclass(slots=True)
class PrefetchCounters:
    """What a predictor was worth since the counters were made. Of the `asked` experts that decoding asked for where
    something was predicted, `right` were among the `named`; `read_bytes` were read for guesses, right or wrong.
    """

    asked: int = 0
    named: int = 0
    right: int = 0
    read_bytes: int = 0


class Prefetcher:
    """Acts on what a predictor names. One thread calls it, the model's.

    Args:
        predictors: name experts of the next layer; if there are several, the first of them names none.
        cache, fetcher: where guessed experts take slots, and what brings them there.
        first: per MoE layer, the number of its first expert when experts are counted over all layers.
        most_guesses: how many guesses may be on their way at once, so that slots for one layer's choice are left; it
            may be changed.
    """

    def __init__(
        self,
        predictors: Mapping[str, Predictor],
        cache: ExpertCache,
        fetcher: Fetcher,
        first: list[int],
        most_guesses: int,
    ) -> None:
        self.counters = PrefetchCounters()
        self._predictors = dict(predictors)
        self.foresees = any(not isinstance(each, NoPredictor) for each in predictors.values())
        """Whether there is anybody to ask what comes next."""
        self._trials = Trials(list(predictors))
        self._foreseeing_s = 0.0
        self._begun_s = 0.0
        self._missed_before = 0
        self._cache = cache
        self._fetcher = fetcher
        self._first = first
        self.most_guesses = most_guesses
        self._named: list[int] = []
        self._unread: set[int] = set()
        """Guesses whose reads have not ended, whatever has become of them."""
        self._on_their_way: set[int] = set()
        self._given_up: set[int] = set()
        self._held: set[int] = set()
        """What was named, in memory or on its way: it stays until its layer has chosen."""

    @property
    def way(self) -> str:
        """The predictor that is asked now, by its name."""
        return self._trials.way

    @property
    def best(self) -> str:
        """The predictor that was found to be best; "" where no other was compared with it, or that has not ended."""
        return self.way if len(self._predictors) > 1 and self._trials.is_settled else ""

    def begin_with(self, way: str) -> None:
        """Ask this predictor, which was the best before, and try the others later."""
        self._trials = Trials(list(self._predictors), way)

    def leave_out(self, way: str) -> None:
        """Ask this predictor no more, if there is one of this name beside others; all others are tried anew."""
        if self._predictors.pop(way, None) is not None:
            self._trials = Trials(list(self._predictors))

    def observe(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """MoE layer `layer` has chosen experts (numbers within the layer) for `tokens`."""
        for predictor in self._predictors.values():
            predictor.observe(layer, tokens)

    def begin_token(self) -> None:
        """One token has reached the first MoE layer."""
        self._begun_s = time.perf_counter()
        self._missed_before = self._missed

    def has_run(self, layer: int, stalled_s: float) -> None:
        """MoE layer `layer` has been computed for one token, and waited so long for bytes."""
        self._trials.record(self._foreseeing_s, stalled_s)
        if layer + 1 == len(self._first):
            self._trials.token_ended(time.perf_counter() - self._begun_s, self._missed - self._missed_before)

    @property
    def _missed(self) -> int:
        """Experts that were asked for and had to be brought, foreseen or not."""
        return self._cache.counters.misses + self._cache.counters.prefetch_used

    @property
    def unsettled(self) -> Set[int]:
        """Guesses that were given up, and whose reads have not ended: they cannot be leased yet."""
        return self._given_up

    def settle(self, chosen: Collection[int]) -> None:
        """A layer has `chosen` its experts: what was guessed right is waited for from now on, the rest is given up."""
        if chosen and self._named:
            self._learn(chosen)
        self._keep(chosen)
        for expert in self._on_their_way:
            self._fetcher.promote(expert)
        self._on_their_way.clear()
        for expert in self._held:
            self._cache.release(expert)
        self._held.clear()
        self._named = []

    def look_ahead(self, layer: int, added: Added | None = None) -> None:
        """MoE layer `layer` has asked for its experts, which have `added` so much so far: ask for those that the
        next one may choose; after the last one that is the first, for the next token, and so it is for the token that
        has entered the model, as layer -1. What is named now takes the place of what was named before.
        """
        begin = time.perf_counter()
        named = self._predictors[self._trials.way].predict(layer, added)
        if named:
            first = self._first[(layer + 1) % len(self._first)]
            self._guess([first + number for number in named])
        self._foreseeing_s = time.perf_counter() - begin

    def _keep(self, experts: Collection[int]) -> None:
        """Give up what was named before, except these."""
        for expert in [each for each in self._held if each not in experts]:
            self._held.remove(expert)
            self._cache.release(expert)
        for expert in [each for each in self._on_their_way if each not in experts]:
            self._on_their_way.remove(expert)
            self._fetcher.cancel(expert)
            self._given_up.add(expert)

    def _guess(self, experts: list[int]) -> None:
        self._named = experts
        self._keep(experts)
        for expert in experts:
            if expert not in self._held and self._cache.is_resident(expert):
                self._hold(expert)
        for expert in experts:
            if len(self._on_their_way) + len(self._given_up) >= self.most_guesses:
                return
            if self._cache.slot(expert) is None:
                slot = self._cache.foresee(expert)
                if slot is None:
                    return
                fetch(self._cache, self._fetcher, expert, slot, Urgency.GUESS)
                self._on_their_way.add(expert)
                self._unread.add(expert)
                self._hold(expert)

    def _hold(self, expert: int) -> None:
        self._cache.hold(expert)
        self._held.add(expert)

    def ended(self, arrival: Arrival) -> None:
        """A fetch has ended; it may have been a guess."""
        self._on_their_way.discard(arrival.key)
        self._given_up.discard(arrival.key)
        if arrival.error is not None and arrival.key in self._held:
            self._held.remove(arrival.key)
            self._cache.release(arrival.key)
        if arrival.key in self._unread:
            self._unread.remove(arrival.key)
            self.counters.read_bytes += arrival.read_bytes

    def _learn(self, chosen: Collection[int]) -> None:
        self.counters.asked += len(chosen)
        self.counters.named += len(self._named)
        self.counters.right += sum(expert in chosen for expert in self._named)


class WarmUp:
    """Fills empty slots with experts that nobody has asked for yet, while nothing else is read. Later it brings others
    in the same way, one at a time.

    Args:
        experts: what to fetch, the most wanted first.
        cache, fetcher: where they take slots, and what brings them there.
        spare: so many slots stay empty, for what is asked for meanwhile.
    """

    def __init__(self, experts: Iterable[int], cache: ExpertCache, fetcher: Fetcher, spare: int) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._unread: dict[int, None] = {}
        self._leaving: set[int] = set()
        for expert in experts:
            if cache.num_free <= spare:
                break
            self._preload(expert)

    def add(self, expert: int) -> None:
        """Bring `expert`, too, in the place of another, unless it is there or something else is on its way."""
        if not self._unread and not self._leaving and self._cache.slot(expert) is None:
            self._preload(expert)

    def _preload(self, expert: int) -> None:
        slot = self._cache.preload(expert)
        if slot is not None:
            fetch(self._cache, self._fetcher, expert, slot, Urgency.WARM_UP)
            self._unread[expert] = None

    def keep(self, expert: int) -> None:
        """Somebody waits for this expert now: it is given up no more."""
        self._unread.pop(expert, None)

    def make_room(self) -> bool:
        """Somebody needs a slot: if none is empty, the least wanted expert that is not there yet gives its own up.
        Whether one did: the end of its fetch is then among the arrivals, now or soon.
        """
        if not self._unread or self._cache.num_free:
            return False
        self._give_up()
        return True

    @property
    def is_any_leaving(self) -> bool:
        """Whether one was given up, and its fetch has not ended."""
        return bool(self._leaving)

    def is_leaving(self, expert: int) -> bool:
        """Whether it was given up, and its fetch has not ended: it cannot be leased yet."""
        return expert in self._leaving

    def _give_up(self) -> None:
        expert, _ = self._unread.popitem()
        self._leaving.add(expert)
        self._fetcher.cancel(expert)

    def give_up(self) -> int:
        """Fetch no more, and say how many fetches have not ended."""
        while self._unread:
            self._give_up()
        return len(self._leaving)

    def ended(self, arrival: Arrival) -> None:
        """A fetch has ended; it may have been one of these."""
        self._unread.pop(arrival.key, None)
        self._leaving.discard(arrival.key)
