"""Two tiers of experts: the slots of a device, and host memory behind them, with the disk behind that.

`HostTier` is to the device's slots what `ExpertReader` is to those of host memory: it is told which expert goes into
which slot, and tells when it is there. On the way it keeps experts in slots of its own, with its own bookkeeping, and a
copy in host memory is leased for as long as something is read from it. Nothing is copied between the slots. Decides
nothing about the device's slots, and computes nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from .cache import ExpertCache, Outcome
from .device import Copy, Device
from .dtypes import TORCH_DTYPES
from .ledger import slot_bytes
from .manifest import ExpertLayout
from .steps import Arrival
from .transfer import Fetcher, SlotPool, SlotTensors, Urgency

__all__ = ["DevicePool", "HostTier"]

_GUESSES_ON_THE_LINK = 2
"""Copies that nobody waits for are asked for while no more than this are under way: an urgent one waits for these."""


class DevicePool:
    """`num_slots` equal pieces of the device's memory, laid out as those of host memory are, so that one copy fills a
    slot.

    `weights` has each tensor of all slots together, [slots, …]. Raises torch.OutOfMemoryError.
    """

    weights: dict[str, torch.Tensor]

    def __init__(self, layout: ExpertLayout, num_slots: int, device: Device) -> None:
        self.slot_bytes = slot_bytes(layout)
        self._layout = layout
        self._device = device
        self._allocate(num_slots)

    def _allocate(self, num_slots: int) -> None:
        memory = self._device.allocate(num_slots * self.slot_bytes).view(num_slots, self.slot_bytes)
        self.weights = {
            spec.name: memory[:, spec.offset : spec.offset + spec.nbytes]
            .view(TORCH_DTYPES[spec.dtype])
            .view(num_slots, *spec.shape)
            for spec in self._layout.tensors
        }
        self._bytes = memory[:, : self._layout.nbytes].unbind()
        self._tensors = [
            {name: all_slots[slot] for name, all_slots in self.weights.items()} for slot in range(num_slots)
        ]

    def shrink(self, num_slots: int) -> None:
        self.close()
        self._allocate(num_slots)

    def close(self) -> None:
        self.weights, self._bytes, self._tensors = {}, (), []
        self._device.free()

    def memory(self, slot: int) -> torch.Tensor:
        """The bytes of the slot's expert."""
        return self._bytes[slot]

    def tensors(self, slot: int) -> SlotTensors:
        return self._tensors[slot]

    def release(self, slot: int) -> None:
        """Nothing: it is all one piece."""


@dataclass(slots=True)
class _Fetch:
    """An expert on its way into a slot of the device. `read_bytes` came off the disk."""

    key: int
    slot: int
    urgency: Urgency
    read_bytes: int = 0
    is_cancelled: bool = False


class HostTier:
    """Brings experts into the slots of a device: from host memory, or from disk through it.

    A fetch waits for a slot of host memory, is read from disk if it is not there yet, waits for the link, and is
    copied. What somebody waits for goes first everywhere, and what nobody waits for takes half of the slots at most.
    Everything is moved on when it is called, by one thread, the model's. `is_pinned`: whether copies go as fast as they
    can. `copies` have ended so far, which took the link `copying_s` seconds. Others may hold what is in host memory.

    Args:
        cache: the books of host memory, at least 2 slots; nobody else uses it.
        pool: its slots; the device reaches them by itself, if it can, until `close`, which closes them, too.
        disk: what fills them; closed with this.
        device: does the copying.
        slots: where experts are copied to.
    """

    def __init__(self, cache: ExpertCache, pool: SlotPool, disk: Fetcher, device: Device, slots: DevicePool) -> None:
        self.cache = cache
        self.pool = pool
        self._disk = disk
        self._device = device
        self._slots = slots
        self.is_pinned = device.pin(pool.bytes)
        self.copies, self.copying_s = 0, 0.0
        self._waiting: list[dict[int, _Fetch]] = [{} for _ in Urgency]
        """For a slot of host memory, by urgency."""
        self._reading: dict[int, _Fetch] = {}
        self._here: list[dict[int, _Fetch]] = [{} for _ in Urgency]
        """In host memory, leased, for the link, by urgency."""
        self._copying: deque[tuple[_Fetch, Copy]] = deque()
        self._held: list[int] = []
        self._ended: deque[Arrival] = deque()

    def fetch(self, key: int, slot: int, urgency: Urgency) -> None:
        self._waiting[urgency][key] = _Fetch(key, slot, urgency)
        self._move_on()

    def promote(self, key: int) -> None:
        if key in self._reading:
            self._reading[key].urgency = Urgency.DEMAND
            self._disk.promote(key)
            return
        for queues in (self._waiting, self._here):
            fetch = _take(queues, key)
            if fetch is not None:
                fetch.urgency = Urgency.DEMAND
                queues[Urgency.DEMAND][key] = fetch
        self._move_on()

    def cancel(self, key: int) -> None:
        if key in self._reading:
            self._reading[key].is_cancelled = True
            self._disk.cancel(key)
        elif _take(self._waiting, key) is not None:
            self._ended.append(Arrival(key, 0, cancelled=True))
        elif (fetch := _take(self._here, key)) is not None:
            self.cache.release(key)
            self._ended.append(Arrival(key, fetch.read_bytes, cancelled=True))

    def hold(self, key: int) -> SlotTensors:
        """Lease an expert that is in host memory, for somebody who reads it there until `let_go`. Until then nobody may
        wait for fetches, which may wait for its slot.
        """
        leased = self.cache.acquire(key)
        assert leased is not None
        slot, outcome = leased
        assert outcome is Outcome.HIT, f"expert {key} is not in host memory"
        self._held.append(key)
        return self.pool.tensors(slot)

    def let_go(self, key: int) -> None:
        """End such a lease."""
        self._held.remove(key)
        self.cache.release(key)

    def poll(self) -> Arrival | None:
        self._move_on()
        if self._ended:
            return self._ended.popleft()
        if self._copying and self._copying[0][1].query():
            return self._copied()
        return None

    def wait(self) -> Arrival:
        while (arrival := self.poll()) is None:
            if self._copying:
                self._copying[0][1].synchronize()
            else:
                self._read(self._disk.wait())
        return arrival

    def close(self) -> None:
        self._disk.close()
        for _, copy in self._copying:
            copy.synchronize()
        if self.is_pinned:
            self._device.unpin(self.pool.bytes)
            self.is_pinned = False
        self.pool.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if what is under way and the books contradict each other. For tests."""
        self.cache.check_integrity()
        leased = [key for queue in self._here for key in queue] + [fetch.key for fetch, _ in self._copying]
        leased += self._reading
        assert len(set(leased)) == len(leased), "an expert is under way twice"
        slots = {self.cache.slot(key) for key in leased}
        assert None not in slots, "an expert is under way from no slot"
        assert sum(self.cache._leases) == len(leased) + len(self._held), "a lease was left behind"

    def _move_on(self) -> None:
        """Do what can be done now, without waiting for anything."""
        while (arrival := self._disk.poll()) is not None:
            self._read(arrival)
        while (fetch := _first(self._waiting, self._has_room_for_guesses)) is not None:
            leased = self.cache.acquire(fetch.key)
            if leased is None:
                break
            del self._waiting[fetch.urgency][fetch.key]
            slot, outcome = leased
            if outcome is Outcome.HIT:
                self._here[fetch.urgency][fetch.key] = fetch
            else:
                self._reading[fetch.key] = fetch
                self._disk.fetch(fetch.key, slot, fetch.urgency)
        while (fetch := _first(self._here, len(self._copying) < _GUESSES_ON_THE_LINK)) is not None:
            del self._here[fetch.urgency][fetch.key]
            self._copying.append((fetch, self._copy(fetch)))

    @property
    def _has_room_for_guesses(self) -> bool:
        return len(self._reading) + sum(map(len, self._here)) < self.cache.num_slots // 2

    def _copy(self, fetch: _Fetch) -> Copy:
        slot, into = self.cache.slot(fetch.key), self._slots.memory(fetch.slot)
        assert slot is not None
        return self._device.copy(into, self.pool.bytes[slot, : len(into)])

    def _read(self, arrival: Arrival) -> None:
        """A read has ended."""
        fetch = self._reading.pop(arrival.key)
        if arrival.error is not None or arrival.cancelled:
            self.cache.failed(arrival.key)
            self._ended.append(arrival)
            return
        self.cache.arrived(arrival.key)
        if fetch.is_cancelled:
            self.cache.release(arrival.key)
            self._ended.append(Arrival(arrival.key, arrival.read_bytes, cancelled=True))
            return
        fetch.read_bytes = arrival.read_bytes
        self._here[fetch.urgency][fetch.key] = fetch

    def _copied(self) -> Arrival:
        """The oldest copy has ended."""
        fetch, copy = self._copying.popleft()
        self.copies += 1
        self.copying_s += copy.seconds()
        self.cache.release(fetch.key)
        return Arrival(fetch.key, fetch.read_bytes)


def _first(queues: list[dict[int, _Fetch]], and_guesses: bool) -> _Fetch | None:
    """The most urgent of the fetches in `queues`, the first of those alike."""
    for queue in queues if and_guesses else queues[: Urgency.GUESS]:
        for fetch in queue.values():
            return fetch
    return None


def _take(queues: list[dict[int, _Fetch]], key: int) -> _Fetch | None:
    """Take a fetch that nobody waits for out of its queue."""
    for queue in queues[Urgency.GUESS :]:
        if key in queue:
            return queue.pop(key)
    return None
