"""What this machine can do: found out in under a minute, kept in `$MOEINF_HOME/machine.json`.

Puts together what the system says (`hardware`, `memory`) and what is measured (`disk`, `maths`, `layer`, `gpu`).
Figures are kept for as long as the machine is the same; what changes from hour to hour is asked anew every time.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import torch

from moeinf import hardware, memory
from moeinf.errors import IntegrityError
from moeinf.evidence import MACHINE_FILE
from moeinf.files import FileSystem, explained, publish
from moeinf.kernels.native import best_variant, can_add_as_torch_does
from moeinf.locks import exclusive_lock
from moeinf.machine import Disk, Gpu, HostMemory, Machine, Processor, ReadRate
from moeinf.progress import NO_PROGRESS, Progress
from moeinf.shared_library import NotNativeError
from moeinf.timing import measure_fresh_memory, measure_memory, open_pool

from .disk import measure_disk
from .effort import Effort
from .gpu import GPU_RATES, Accelerator, Cuda, measure_gpus
from .layer import measure_layer
from .maths import MATHS, measure_dense, measure_maths, measure_program

__all__ = ["Effort", "load_or_measure", "measure_machine"]

_LOCK_NAME = "profile.lock"
_MEMORY_SHARE, _WORKING_SET_SHARE = 4, 8
"""Of the memory that is available, at most a fourth is read into or read at once, and an eighth computed with."""


def measure_machine(
    home: Path, progress: Progress = NO_PROGRESS, effort: Effort = Effort(), accelerator: Accelerator = Cuda()
) -> Machine:
    """Measure this machine, and the disk that holds `home`, which is made if it is missing.

    Raises CapacityError or UsageError when nothing can be written there, MoeinfError when another process is measuring.
    """
    home, load = home.absolute(), _Load()
    with ExitStack() as stack:
        with explained(home):
            FileSystem().make_folder(home)
            stack.enter_context(exclusive_lock(home / _LOCK_NAME, "measuring"))
        available = memory.available_bytes()
        reads = measure_disk(home, shutil.disk_usage(home).free, available // _MEMORY_SHARE, effort, progress)
        pool = open_pool(torch.get_num_threads(), stack)
        working_set = min(effort.working_set, available // _WORKING_SET_SHARE)
        count = sum(pool is not None or kernels == "torch" for kernels, _, _ in MATHS) + 4
        with progress.task("memory and maths", count, "rates") as task:
            nbytes = min(effort.memory, available // _MEMORY_SHARE)
            fresh_rate = measure_fresh_memory(nbytes)
            memory_rate = measure_memory(pool, nbytes, effort.maths_s)
            task.advance(1)
            maths, late = measure_maths(pool, working_set, effort, task)
            dense = measure_dense(pool, working_set, effort.maths_s)
            task.advance(1)
            program_s = measure_program(effort.maths_s)
            task.advance(1)
            layer = measure_layer(effort.layer_s)
            task.advance(1)
        gpus, failed = _measure_gpus(accelerator, effort, progress)
    return Machine(
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        processor=_processor(),
        memory=_memory(memory_rate, fresh_rate),
        disk=_disk(home, reads.reads_direct, reads.rates),
        maths=maths,
        dense_bytes_per_s=dense,
        layer_s=layer.layer_s,
        whole_layer_s=layer.whole_layer_s,
        fetch_s=layer.fetch_s,
        foresee_s=layer.foresee_s,
        program_s=program_s,
        gpus=gpus,
        left_out=(*reads.left_out, *late, *failed),
        load=load.of_others(),
        seen_gpus=tuple(_gpu_names(accelerator)),
    )


def load_or_measure(
    home: Path,
    progress: Progress = NO_PROGRESS,
    *,
    refresh: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    measure: Callable[[Path, Progress], Machine] = measure_machine,
    accelerator: Accelerator = Cuda(),
) -> Machine:
    """The kept figures of this machine with its live values (free memory, free disk), or new ones, which are kept, when
    there are none, they cannot be read, the machine has changed, or `refresh` asks for it. `notify` is told why.

    Raises what `measure_machine` raises, and CapacityError or UsageError when the result cannot be kept.
    """
    path = home.absolute() / MACHINE_FILE
    kept = None if refresh else _read(path, notify)
    if kept is not None:
        now = _refreshed(kept, home.absolute(), accelerator)
        changed = _differences(kept, now, _gpu_names(accelerator))
        if not changed:
            return now
        notify(f"{path.name} is of another machine ({', '.join(changed)}): measuring again")
    machine = measure(home, progress)
    publish(path, [f"{json.dumps(machine.to_dict())}\n".encode()])
    return machine


class _Load:
    """Cores that other programs take from now on."""

    def __init__(self) -> None:
        self._begin = self._clocks()

    def of_others(self) -> float:
        """How many, on average."""
        worked_s, own_s, passed_s = (after - before for before, after in zip(self._begin, self._clocks(), strict=True))
        return max(0.0, worked_s - own_s) / passed_s

    def _clocks(self) -> tuple[float, float, float]:
        return hardware.worked_s(), time.process_time(), time.perf_counter()


def _read(path: Path, notify: Callable[[str], None]) -> Machine | None:
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, IntegrityError) as error:
        notify(f"{path.name} cannot be used ({error}): measuring again")
        return None


def _refreshed(kept: Machine, home: Path, accelerator: Accelerator) -> Machine:
    """`kept` with all that need not be measured asked anew."""
    return dataclasses.replace(
        kept,
        processor=_processor(),
        memory=_memory(kept.memory.bytes_per_s, kept.memory.fresh_bytes_per_s),
        disk=_disk(home, kept.disk.reads_direct, kept.disk.rates),
        gpus=tuple(dataclasses.replace(gpu, free=_free_bytes(accelerator, gpu)) for gpu in kept.gpus),
    )


def _differences(kept: Machine, now: Machine, gpus: list[str]) -> list[str]:
    """What is not as it was when the figures were taken, and must be for them to hold; `gpus` are those here now."""
    pairs = {
        "processor": (kept.processor.name, now.processor.name),
        "cores": (kept.processor.cores, now.processor.cores),
        "threads": (kept.processor.threads, now.processor.threads),
        "native library": (kept.processor.kernels, now.processor.kernels),
        "memory": (kept.memory.total, now.memory.total),
        "memory limit": (kept.memory.limit, now.memory.limit),
        "disk": ((kept.disk.device, kept.disk.filesystem), (now.disk.device, now.disk.filesystem)),
        "GPUs": (list(kept.seen_gpus), gpus),
    }
    return [what for what, (before, after) in pairs.items() if before != after]


def _processor() -> Processor:
    try:
        kernels, no_kernels = best_variant(), ""
    except NotNativeError as error:
        kernels, no_kernels = "", str(error)
    return Processor(
        name=hardware.processor_name(),
        cores=hardware.usable_cores(),
        threads=torch.get_num_threads(),
        features=hardware.processor_features(),
        kernels=kernels,
        no_kernels=no_kernels,
        governor=hardware.clock_governor(),
        adds_as_torch_does=can_add_as_torch_does(),
    )


def _memory(bytes_per_s: float, fresh_bytes_per_s: float) -> HostMemory:
    swap_total, swap_free = memory.swap_bytes()
    return HostMemory(
        total=memory.total_bytes(),
        available=memory.available_bytes(),
        limit=memory.limit_bytes(),
        swap_total=swap_total,
        swap_free=swap_free,
        bytes_per_s=bytes_per_s,
        fresh_bytes_per_s=fresh_bytes_per_s,
        huge_pages=hardware.huge_pages(),
    )


def _disk(home: Path, reads_direct: bool, rates: tuple[ReadRate, ...]) -> Disk:
    mount = hardware.find_mount(home.resolve())
    return Disk(
        path=str(home),
        device=mount.device,
        filesystem=mount.filesystem,
        reads_direct=reads_direct,
        read_ahead=hardware.read_ahead_bytes(home),
        free=shutil.disk_usage(home).free,
        rates=rates,
        rotates=hardware.is_rotating(home),
    )


def _measure_gpus(
    accelerator: Accelerator, effort: Effort, progress: Progress
) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    count = accelerator.count()
    if not count:
        return (), ()
    with progress.task("GPU", count * GPU_RATES, "rates") as task:
        return measure_gpus(accelerator, effort, task)


def _free_bytes(accelerator: Accelerator, gpu: Gpu) -> int:
    """What is free of it now; nothing if it does not answer."""
    try:
        return accelerator.memory(gpu.index)[0]
    except RuntimeError:
        return 0


def _gpu_names(accelerator: Accelerator) -> list[str]:
    try:
        return [accelerator.name(index) for index in range(accelerator.count())]
    except RuntimeError:
        return []
