"""How much a measurement of the machine may take."""

from __future__ import annotations

from dataclasses import dataclass

from moeinf.units import GIB, MIB

__all__ = ["Effort"]


@dataclass(frozen=True, slots=True)
class Effort:
    """What is measured and for how long. The defaults take about 45 seconds, and hardly more on a slow disk: when the
    disk's share of time is over, what is left of its sizes and depths is left out.

    Args:
        sizes: bytes of an expert, whole pages.
        depths: requests in flight; the one that the engine has comes first, as the last ones may be left out.
        scratch: bytes of the file that is read.
        working_set: bytes of experts or weights that maths goes through, far beyond the caches.
        memory: bytes that are read to find the rate of memory.
        disk_s: for everything that is done to the disk, writing the file included.
        read_s: for reading at one size and depth; one that would take more than four times that is left out.
        maths_s: for each rate of maths.
        experts_s: for all rates of experts; a precision that is not begun by then is left out, bfloat16 excepted.
        layer_s: for what a layer costs beside its weights.
        link: bytes that are copied to a GPU and back.
    """

    sizes: tuple[int, ...] = tuple(mebibytes * MIB for mebibytes in (1, 3, 10, 30, 100, 350))
    depths: tuple[int, ...] = (8, 1, 16, 4)
    scratch: int = 2 * GIB
    working_set: int = 512 * MIB
    memory: int = 1 * GIB
    disk_s: float = 35.0
    read_s: float = 0.35
    maths_s: float = 0.3
    experts_s: float = 15.0
    layer_s: float = 3.0
    link: int = 256 * MIB
