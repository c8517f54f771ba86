"""What is done about experts that a device lacks and host memory has, while decoding: they are copied to the device, or
the processor computes them where they are, or some the one way and some the other, both at once.

`share` is the arithmetic, `MissChoice` applies it to what both ways have taken so far, and `HostMisses` has the chosen
experts computed, and says which of them an idle link should bring. Knows nothing of the device's slots, and adds
nothing up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum

import torch

from .kernels import ExpertMaths, Tensors
from .tiers import HostTier

__all__ = ["Costs", "HostMisses", "HostStep", "MissChoice", "Way", "share"]

_TRIED_FOR = 0.01
"""A way that seems slower is tried again as soon as this share of the time since it was last gone pays for that: what
it takes may have changed."""
_FASTER, _SLOWER = 1 / 2, 1 / 8
"""What a measurement weighs in a running estimate. Much makes a step look slow, and nothing makes it look fast."""


class Way(Enum):
    """How a step comes by the experts that are not on the device: over the link, by the processor, or by both."""

    LINK = "link"
    HOST = "host"
    BOTH = "both"

    @classmethod
    def of(cls, count: int, on_host: int) -> Way:
        """Of a step that lacks `count` experts and has `on_host` of them computed by the processor."""
        return cls.LINK if not on_host else cls.HOST if on_host == count else cls.BOTH


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that an expert takes: to be copied (`link_s`) or to be computed by the processor (`host_s`) while the
    other way is idle; and the same while both are gone, which share the bandwidth of host memory. `trip_s` is what a
    hidden state takes to the processor and the results back, whatever their number.
    """

    link_s: float
    host_s: float
    link_beside_s: float
    host_beside_s: float
    trip_s: float = 0.0

    def step_s(self, count: int, on_host: int) -> float:
        """Seconds until `count` experts are there, of which the processor computes `on_host`."""
        match Way.of(count, on_host):
            case Way.LINK:
                return count * self.link_s
            case Way.HOST:
                return self.trip_s + count * self.host_s
            case Way.BOTH:
                return max((count - on_host) * self.link_beside_s, self.trip_s + on_host * self.host_beside_s)


def share(count: int, costs: Costs) -> int:
    """How many of `count` experts the processor computes if they are to be there soonest; the fewest of those alike,
    for what was copied stays.

    Where whole experts let it, both ways end together: the link brings the share W_link / (W_link + W_host) of them, W
    being experts per second while both are gone. If that takes longer than either alone, it is either alone.
    """
    return min(range(count + 1), key=lambda on_host: costs.step_s(count, on_host))


class MissChoice:
    """Chooses for one step after the other how many experts the processor computes, by running estimates of what the
    ways take. One that is not known yet is tried.
    """

    def __init__(self) -> None:
        self._link_s: dict[Way, float] = {}
        self._host_s: dict[Way, float] = {}
        self._trip_s: float | None = None
        self._since_s = dict.fromkeys(Way, 0.0)
        """Seconds of steps since each way was last gone, as estimated."""

    @property
    def costs(self) -> Costs | None:
        """What is known; None as long as one of the ways was never gone. That one slows the other is not assumed."""
        if Way.LINK not in self._link_s or Way.HOST not in self._host_s or self._trip_s is None:
            return None
        link_s, host_s = self._link_s[Way.LINK], self._host_s[Way.HOST]
        beside = self._link_s.get(Way.BOTH, link_s), self._host_s.get(Way.BOTH, host_s)
        return Costs(link_s, host_s, *beside, self._trip_s)

    def on_host(self, count: int) -> int:
        """How many of the `count` experts that a step lacks, at least one, the processor is to compute."""
        costs = self.costs
        if costs is None:
            return count if Way.LINK in self._link_s else 0
        chosen = share(count, costs)
        least_s = costs.step_s(count, chosen)
        mixed = min(range(1, count), key=lambda on_host: costs.step_s(count, on_host), default=0)
        for other in (0, count, mixed):
            more_s = costs.step_s(count, other) - least_s
            if other != chosen and more_s < _TRIED_FOR * self._since_s[Way.of(count, other)]:
                chosen = other
                break
        for way in Way:
            self._since_s[way] += least_s
        self._since_s[Way.of(count, chosen)] = 0.0
        return chosen

    def copied(self, way: Way, copy_s: float) -> None:
        """A copy took so long in a step that went this way."""
        way = Way.LINK if way is Way.LINK else Way.BOTH
        self._link_s[way] = _estimate(self._link_s.get(way), copy_s)

    def computed(self, way: Way, expert_s: float, trip_s: float) -> None:
        """In a step that went this way the processor took `expert_s` for each expert, and `trip_s` passed on the way
        there and back. Of the first step no more is noted than that: it is slower than all that follow.
        """
        if self._trip_s is None:
            self._trip_s = trip_s
            return
        self._trip_s = _estimate(self._trip_s, trip_s)
        self._host_s[way] = _estimate(self._host_s.get(way), expert_s)


def _estimate(known: float | None, measured: float) -> float:
    if known is None:
        return measured
    return known + (measured - known) * (_FASTER if measured < known else _SLOWER)


class HostStep:
    """What the processor computes of one step: the experts `keys`, leased in host memory until that is done. `behind`,
    if any, is one of them that the link, otherwise idle, should bring to the device afterwards.

    Args:
        keys: the experts.
        tensors: their slots'.
        leases: ends the leases when it is closed.
        maths: computes them.
        hidden: the token's hidden state [1, H] on the device, which is not asked for anything else yet.
    """

    def __init__(
        self, keys: list[int], tensors: Sequence[Tensors], leases: ExitStack, maths: ExpertMaths, hidden: torch.Tensor
    ) -> None:
        self.keys = keys
        self.behind: int | None = None
        self._tensors = tensors
        self._leases = leases
        self._maths = maths
        self._place = hidden.device
        begin = time.perf_counter()
        self._hidden = hidden.to("cpu")
        self.trip_s, self.maths_s = time.perf_counter() - begin, 0.0

    def rows(self) -> torch.Tensor:
        """The rows of the experts `keys` [n, H], not yet weighted, on the device."""
        begin = time.perf_counter()
        rows = self._maths.rows(self._hidden, self._tensors)
        computed = time.perf_counter()
        self._leases.close()
        sent = rows.to(self._place, non_blocking=True)  # behind what the device was asked to compute, unawaited
        self.maths_s = computed - begin
        self.trip_s += time.perf_counter() - computed
        return sent


class HostMisses:
    """Has experts computed by the processor that host memory has and the device lacks.

    Args:
        tier: host memory, and the link.
        maths: the experts' functions on the processor, one per MoE layer.
        choice: how many of a step; None means all of them.
    """

    def __init__(self, tier: HostTier, maths: Sequence[ExpertMaths], choice: MissChoice | None) -> None:
        self._tier = tier
        self._maths = maths
        self._choice = choice
        self._noted = (0, 0.0)

    @property
    def kernels(self) -> Iterable[str]:
        """What computes."""
        return (maths.computed_by for maths in self._maths)

    @contextmanager
    def step(self, layer: int, hidden: torch.Tensor, absent: Iterable[int]) -> Iterator[HostStep | None]:
        """While this is open, a token with this `hidden` state [1, H] passes MoE `layer`. Of the experts `absent` from
        the device, the most preferred by the router first, it has those to fetch before those to compute, if any.
        """
        self._note_copies(Way.LINK)
        here = [key for key in absent if self._tier.cache.is_resident(key)]
        count = on_host = len(here)
        if self._choice is not None and here:
            on_host = self._choice.on_host(count)
        way = Way.of(count, on_host)
        if not on_host:
            yield None
        else:
            with ExitStack() as leases:
                keys, tensors = here[count - on_host :], []
                for key in keys:
                    tensors.append(self._tier.hold(key))
                    leases.callback(self._tier.let_go, key)
                step = HostStep(keys, tensors, leases, self._maths[layer], hidden)
                if self._choice is not None and way is Way.HOST:
                    step.behind = keys[0]
                yield step
            if self._choice is not None:
                self._choice.computed(way, step.maths_s / on_host, step.trip_s)
        self._note_copies(way)

    def _note_copies(self, way: Way) -> None:
        """Tell the choice what copies took that ended since the last time, in a step that went this way."""
        (copies, copying_s), self._noted = self._noted, (self._tier.copies, self._tier.copying_s)
        if self._choice is not None and self._tier.copies > copies:
            self._choice.copied(way, (self._tier.copying_s - copying_s) / (self._tier.copies - copies))
