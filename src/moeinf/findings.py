"""What stands in the way of speed on a machine, what it costs, and the command that mends it. A pure function of what
was measured: no finding without a figure or a setting that shows it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from .machine import Disk, HostMemory, Machine, Processor
from .units import GIB, KIB, MIB, format_bytes, format_seconds

__all__ = ["Finding", "find"]

_LARGE_READ_AHEAD = 1 * MIB
_GOOD_READ_AHEAD = 128 * KIB
_SLOW_DISK = 1e9
_SPINNING = 0.3e9
"""Bytes per second below which a disk is called slow, and believed when it says that it spins."""
_EXPERT = 10 * MIB
_LITTLE_FREE = 20 * GIB
_LITTLE_SWAP = 64 * MIB
_SHORT_OF_MEMORY = 0.7
"""Experts computed at less than this share of the rate at which memory is read are held up by the maths."""
_WIDE = {"avx512_bf16", "amx_bf16", "bf16"}
_BUSY = 0.2


@dataclass(frozen=True, slots=True)
class Finding:
    """`command` is None where no command mends it."""

    what: str
    cost: str
    command: str | None


def find(machine: Machine) -> list[Finding]:
    """What was found of `machine`, what makes the figures doubtful first."""
    return [
        *_busy(machine),
        *_disk(machine.disk),
        *_memory(machine.memory),
        *_threads(machine.processor),
        *_maths(machine),
    ]


def _busy(machine: Machine) -> Iterator[Finding]:
    if machine.load > _BUSY * machine.processor.cores:
        yield Finding(
            f"other programs took {machine.load:.1f} of {machine.processor.cores} cores meanwhile",
            "the figures are what they left; a quiet machine is faster",
            "moeinf profile --refresh",
        )


def _disk(disk: Disk) -> Iterator[Finding]:
    move = "export MOEINF_HOME=FOLDER_ON_ANOTHER_DISK"
    if not disk.reads_direct:
        yield Finding(
            f"{disk.filesystem or 'the file system'} refuses direct reads",
            "every expert goes through the page cache: it is copied once more, and takes memory that slots could have",
            move,
        )
    rate = disk.rate(_EXPERT, direct=disk.reads_direct)
    if rate < _SLOW_DISK:
        spins = disk.rotates is True and rate < _SPINNING
        yield Finding(
            f"the disk {'spins' if spins else 'is slow'}: {rate / 1e9:.2f} GB/s for experts of {format_bytes(_EXPERT)}",
            f"each expert that is not in memory takes {format_seconds(_EXPERT / rate)}",
            move,
        )
    if disk.read_ahead is not None and disk.read_ahead > _LARGE_READ_AHEAD:
        yield Finding(
            f"the disk's read-ahead is {format_bytes(disk.read_ahead)}",
            _cost_of_read_ahead(disk),
            f"sudo blockdev --setra {_GOOD_READ_AHEAD // 512} {shlex.quote(disk.device)}" if disk.device else None,
        )
    if disk.free < _LITTLE_FREE:
        yield Finding(
            f"{format_bytes(disk.free)} are free on the disk",
            f"no model of more than that can be pulled; 30 billion weights in bfloat16 are {format_bytes(60 * 10**9)}",
            "moeinf list",
        )


def _cost_of_read_ahead(disk: Disk) -> str:
    others = f"mapped weights come 5 to 8 times slower than at {format_bytes(_GOOD_READ_AHEAD)}"
    if disk.reads_direct:
        return f"nothing to moeinf, which reads past it; {others}"
    return f"{others}; moeinf's reads of small experts bring more than was asked for"


def _memory(memory: HostMemory) -> Iterator[Finding]:
    if memory.usable < memory.total // 2:
        yield Finding(
            f"a cgroup allows {format_bytes(memory.usable)} of the machine's {format_bytes(memory.total)}",
            f"{format_bytes(memory.total - memory.usable)} that no expert can use",
            "docker update --memory SIZE --memory-swap SIZE CONTAINER",
        )
    swapped = memory.swap_total - memory.swap_free
    if swapped > _LITTLE_SWAP:
        yield Finding(
            f"{format_bytes(swapped)} are swapped out",
            "what a token needs of that comes back from disk first",
            "sudo swapoff -a && sudo swapon -a" if memory.available > swapped else None,
        )
    if memory.huge_pages == "never":
        yield Finding(
            "huge pages are off",
            "weights lie in pages of 4 KiB: on one machine memory then gave 24 GB/s, and 31 with huge pages, and on"
            " another a token that reads the disk took 1.09 times as long",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _threads(processor: Processor) -> Iterator[Finding]:
    if processor.threads < processor.cores:
        yield Finding(
            f"{processor.threads} of {processor.cores} cores compute",
            f"maths has {processor.threads / processor.cores:.0%} of the cores that it could have",
            f"export OMP_NUM_THREADS={processor.cores}",
        )
    if processor.governor == "powersave":
        yield Finding(
            "the clock of the cores is governed by powersave",
            "cores rise from a low clock when a token begins; measure again afterwards to see how much that was",
            "sudo cpupower frequency-set -g performance",
        )


def _maths(machine: Machine) -> Iterator[Finding]:
    processor, limit = machine.processor, machine.memory.bytes_per_s
    rate = machine.maths_rate("bfloat16")
    cost = f"experts in bfloat16 are computed at {rate / 1e9:.1f} GB/s, and memory gives {limit / 1e9:.1f}"
    if not processor.kernels:
        yield Finding(
            processor.no_kernels or "there is no native library",
            cost,
            "pip install --force-reinstall --no-deps moeinf",
        )
    elif rate < _SHORT_OF_MEMORY * limit and not _WIDE & set(processor.features):
        yield Finding("the processor has no instructions for bfloat16", cost, None)
