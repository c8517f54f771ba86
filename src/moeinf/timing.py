"""How long calls take that nothing disturbs, and by that, how fast memory is read.

What else a machine does only ever makes times longer, so of many the shorter ones count.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle

import torch

from .kernels.native import NativePool
from .shared_library import NotNativeError
from .transfer import allocate_buffer

__all__ = ["Call", "best_of_each", "best_s", "measure_fresh_memory", "measure_memory", "open_pool", "undisturbed"]

_TURNS = 3

Call = Callable[[], object]


def open_pool(threads: int, on_close: ExitStack) -> NativePool | None:
    """The native library with so many threads, which `on_close` ends; None where there is no library."""
    try:
        pool = NativePool(threads)
    except NotNativeError:
        return None
    on_close.callback(pool.close)
    return pool


def measure_memory(pool: NativePool | None, memory_bytes: int, seconds: float) -> float:
    """Bytes per second of reading `memory_bytes`, in huge pages as slots are, with all threads: by the native library,
    or by torch without it.
    """
    memory = torch.frombuffer(allocate_buffer(memory_bytes), dtype=torch.int64, count=memory_bytes // 8).fill_(1)
    read: Call = partial(pool.read, memory) if pool is not None else memory.sum
    return memory.nbytes / best_s([read], seconds)


def measure_fresh_memory(memory_bytes: int) -> float:
    """Bytes per second of memory that the system hands out, in huge pages as slots are, when all threads touch it for
    the first time. Once, since it may hand out again what it got back.
    """
    memory = torch.frombuffer(allocate_buffer(memory_bytes), dtype=torch.uint8, count=memory_bytes)
    begin = time.perf_counter()
    memory[:: mmap.PAGESIZE].fill_(1)
    return memory_bytes / (time.perf_counter() - begin)


def best_s(calls: Sequence[Call], seconds: float) -> float:
    """Seconds of one of `calls`, which take turns, undisturbed: what `best_of_each` finds of them alone."""
    return best_of_each([calls], seconds)[0]


def best_of_each(works: Sequence[Sequence[Call]], seconds: float) -> list[float]:
    """Seconds of a call of each of `works`, undisturbed. Each gets so many `seconds`, a part of them at a time, so that
    what else the machine does in between meets all of them. The first call of each only warms up, if there is time for
    another.
    """
    times: list[list[float]] = [[] for _ in works]
    calls = [cycle(work) for work in works]
    for _ in range(_TURNS):
        for of_one, work in zip(times, calls, strict=True):
            end = time.perf_counter() + seconds / _TURNS
            while sum(of_one) <= seconds:
                begin = time.perf_counter()
                next(work)()
                of_one.append(time.perf_counter() - begin)
                if time.perf_counter() > end:
                    break
    return [undisturbed(of_one[1:] or of_one) for of_one in times]


def undisturbed(times: list[float]) -> float:
    """The time that a quarter of `times` do not reach: what else the machine does only ever makes them longer."""
    return sorted(times)[len(times) // 4]
