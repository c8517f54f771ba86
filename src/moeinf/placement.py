"""Where a model computes, and in which memory: a device found, its memory and the host's divided, its slots made.

Says what a person should know about the choice. Loads nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from . import memory
from .device import Device, find_device
from .errors import CapacityError, UnsupportedError, UsageError
from .hardware import processor_features
from .kernels import is_native_exactly, may_take_long_prompts, takes_long_prompts
from .ledger import Libraries, MemoryPlan, ModelShape
from .manifest import Manifest
from .settings import FEW_PROGRAMS, MANY_PROGRAMS, EngineOptions, keep_programs, kept_programs
from .tiers import DevicePool
from .units import format_bytes

__all__ = ["Placement", "make_pool", "place"]

_TILES = "amx_bf16"
"""The instructions with which torch multiplies by tiles."""
_WIDE = torch.float32
"""What weights are computed in where a device does not have their own dtype, or where that is asked for: nothing that
they held is lost in it.
"""


@dataclass(frozen=True, slots=True)
class Placement:
    """The device, None being the processor; what is held, which is what is stored, with dense weights unpacked unless
    they are computed as they lie; the shape that was planned for; what goes where; what the dense part is computed in;
    and what people should know, in sentences.
    """

    device: Device | None
    manifest: Manifest
    shape: ModelShape
    plan: MemoryPlan
    dtype: torch.dtype
    notes: tuple[str, ...] = ()


def place(manifest: Manifest, shape: ModelShape, options: EngineOptions, *, is_wide: bool = False) -> Placement:
    """Choose, as `options` say; if `is_wide`, the model computes in float32, by torch. With `auto`, a GPU that torch
    cannot use, or that is too small for the model, is left alone, and that is said. Whether the native library adds up
    as torch does is tried here, so libraries are told first how many programs of matrix products to keep.

    Raises what `find_device` and the plans raise, and UsageError or UnsupportedError for options that do not go with
    the device.
    """
    programs = _wanted_programs(manifest, shape, options, is_wide)
    if programs:
        keep_programs(programs)
        kept_programs(programs)  # before torch reads what somebody else has said
    notes: tuple[str, ...] = ()
    try:
        device = find_device(options.device)
    except UnsupportedError as error:
        if options.device != "auto" or options.device_memory is not None:
            raise
        device, notes = None, (f"the GPU is not used: {error}",)
    if device is not None:
        try:
            return _place_on(device, manifest, shape, options, is_wide)
        except CapacityError as error:
            if options.device != "auto" or options.device_memory is not None:
                raise
            notes = (f"{device.name} is not used: {error}",)
    elif options.device_memory is not None:
        raise UsageError("--device-memory bounds a GPU's memory, and none is used", hint="bound --host-memory instead")
    if options.computes_on_host:
        raise UsageError(
            f"--miss {options.miss} is about experts that a GPU lacks, and none is used", hint="leave --miss out"
        )
    if options.kernels == "triton":
        raise UnsupportedError("--kernels triton compute on a GPU, and none is used", hint="leave --kernels out")
    dtype, widening = _widen(manifest, is_wide)
    is_native = dtype == torch.bfloat16 and is_native_exactly(options.kernels)
    held = manifest
    if not is_native or options.compiles:
        held, shape = manifest.unpacked, dataclasses.replace(shape, kept_layers=0)
    libraries = Libraries(
        programs and kept_programs(programs),
        is_native,
        is_native and takes_long_prompts(options.kernels, manifest.layout) and not _lies_across(manifest, shape),
        options.threads or torch.get_num_threads(),
        has_tiles=_TILES in processor_features(),
        compiles=options.compiles,
    )
    return Placement(None, held, shape, memory.plan_memory(held, shape, options, widening, libraries), dtype, notes)


def _wanted_programs(manifest: Manifest, shape: ModelShape, options: EngineOptions, is_wide: bool) -> int:
    """How many programs of matrix products to keep: few if the native library computes the experts of prompts and
    nothing else asks for many, and of float32, which makes none, none. Where the library turns out not to take them,
    that takes longer, and no more memory: libraries are told before the first product, and so before its trial.
    """
    if _widen(manifest, is_wide)[0] == torch.float32:
        return 0
    is_usual = shape.has_plain_attention and not _lies_across(manifest, shape)
    return FEW_PROGRAMS if is_usual and may_take_long_prompts(options.kernels, manifest.layout) else MANY_PROGRAMS


def _lies_across(manifest: Manifest, shape: ModelShape) -> bool:
    """Whether plain experts lie [in, out], which torch computes for prompts."""
    layout = manifest.layout
    shapes = {spec.name: spec.shape for spec in layout.tensors}
    up, down = shapes["gate_up_proj" if "gate_up_proj" in shapes else "up_proj"], shapes["down_proj"]
    return layout.quantization is None and up[0] == down[1] == shape.hidden


def _widen(manifest: Manifest, is_wide: bool) -> tuple[torch.dtype, int]:
    """What to compute in, and how many times the bytes of the model's own dtype that takes."""
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    return (_WIDE, _WIDE.itemsize // dtype.itemsize) if is_wide else (dtype, 1)


def _place_on(
    device: Device, manifest: Manifest, shape: ModelShape, options: EngineOptions, is_wide: bool
) -> Placement:
    if options.kernels == "native":
        raise UnsupportedError(
            f"--kernels native compute on the processor, and the model on {device.name}",
            hint="leave --kernels out, or give --device cpu",
        )
    notes = []
    dtype, widening = _widen(manifest, is_wide)
    if not device.computes(dtype):
        notes.append(f"{device.name} does not compute in {manifest.dtype}: in float32, which takes twice the memory")
        dtype, widening = _widen(manifest, True)
    if device.others:
        notes.append(f"{device.name} alone is used, and {device.others} more of this machine's GPUs are not")
    held, shape = manifest.unpacked, dataclasses.replace(shape, kept_layers=0)
    plan = memory.plan_device_memory(held, shape, options, device.memory()[0], widening)
    return Placement(device, held, shape, plan, dtype, tuple(notes))


def make_pool(manifest: Manifest, placement: Placement) -> tuple[DevicePool, Placement]:
    """The slots on the placement's device, and the placement with as many as there was room for.

    Raises CapacityError if that is fewer than one layer asks for.
    """
    plan, device = placement.plan, placement.device
    assert device is not None
    fewest = max(layer.top_k for layer in manifest.layers)
    slots = plan.slots
    while slots >= fewest:
        try:
            pool = DevicePool(manifest.layout, slots, device)
        except torch.OutOfMemoryError:
            slots = min(slots - 1, slots * 9 // 10)
        else:
            break
    else:
        raise CapacityError(
            f"{device.name} has no room for {fewest} experts of {format_bytes(plan.slot_bytes)}, although"
            f" {format_bytes(plan.experts)} of it were free for {plan.slots}",
            hint="end what else uses the GPU, or give --device cpu",
        )
    if slots == plan.slots:
        return pool, placement
    note = f"{device.name} has less room than it said: it holds {slots:,} experts instead of {plan.slots:,}"
    return pool, dataclasses.replace(
        placement, plan=dataclasses.replace(plan, slots=slots), notes=(*placement.notes, note)
    )
