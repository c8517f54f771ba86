"""A device that is none: torch takes it for one, with tensors that live there and nowhere else, and what is computed on
them is computed on the CPU, to the last bit.

So a tensor that was left on the other side is an error here as it is on a GPU, and all of the engine runs as it would
there. Copies take a while, in which what is overwritten holds nothing sound, and bring what their source holds when
they end: whoever reads too early, or gives a source away too early, gets other numbers.
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import library
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from moeinf import memory, placement
from moeinf.ledger import MemoryPlan

__all__ = ["PLACE", "StandIn", "StandInCopy", "standing_in", "use_device"]

_setup_privateuseone_for_python_backend("standin")
PLACE = torch.device("standin", 0)
_CPU = torch.device("cpu")

_MOVES = {"aten::_to_copy", "aten::copy_", "aten::to"}
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operations that take tensors of both places, as CUDA does."""


class _There(torch.Tensor):
    """A tensor on the device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> _There:
        with torch.inference_mode(False):  # views of tensors that were made outside of it could not be made inside
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=PLACE,
            )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(operation, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"there({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU, and put the result where it belongs."""
    name = operation._schema.name
    if name == "aten::_has_compatible_shallow_copy_type":
        return False
    theirs: dict[int, _There] = {}
    others, places = [], []

    def to_cpu(leaf: Any) -> Any:
        if isinstance(leaf, _There):
            theirs[id(leaf.held)] = leaf
            return leaf.held
        if isinstance(leaf, torch.device):
            places.append(leaf)
            return _CPU
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            others.append(leaf)
        return leaf

    cpu_args, cpu_kwargs = _map(to_cpu, args), _map(to_cpu, kwargs)
    if theirs and others and name not in _MOVES | _INDEXES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    is_there = places[0].type == PLACE.type if places else bool(theirs)

    def from_cpu(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        same = theirs.get(id(leaf))
        if is_there:
            return _There(leaf) if same is None else same
        return leaf if same is None else leaf.clone()

    return _map(from_cpu, operation(*cpu_args, **cpu_kwargs))


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, each) for each in value])
    if isinstance(value, dict):
        return {key: _map(function, each) for key, each in value.items()}
    return function(value)


_fallback: Any = library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_fallback.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")


class _MadeThere(TorchFunctionMode):
    """Numbers that become a tensor of the device at once: torch does not ask the device about that."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == PLACE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(PLACE)
        return function(*args, **kwargs)


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """While this is open, all of torch can be used with the device."""
    with _MadeThere():
        yield StandIn()


@contextmanager
def use_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """While this is open, `--device auto` and `cuda` mean the device, and its `host_slots`, unless None, are how many
    slots host memory has: models of tests are so small that every budget holds all of them.
    """
    plan_device_memory = memory.plan_device_memory

    def plan(*args: Any) -> MemoryPlan:
        made = plan_device_memory(*args)
        assert made.host is not None
        slots = made.host.slots if device.host_slots is None else device.host_slots
        return dataclasses.replace(made, host=dataclasses.replace(made.host, slots=slots))

    with standing_in() as device, monkeypatch.context() as patch:
        patch.setattr(placement, "find_device", lambda name: None if name == "cpu" else device)
        patch.setattr(memory, "plan_device_memory", plan)
        yield device


class StandInCopy:
    """A copy that ends when somebody waits for it, or after it was asked about a few times, and says that the link took
    `link_s` seconds for it.
    """

    def __init__(
        self, into: torch.Tensor, source: torch.Tensor, patience: int, before: StandInCopy | None, link_s: float
    ) -> None:
        self._into, self._source, self._patience, self._before = into, source, patience, before
        self._link_s = link_s
        self.is_done = False
        into.fill_(255)  # NaN in every format

    def query(self) -> bool:
        self._patience -= 1
        if self._patience < 0:
            self.synchronize()
        return self.is_done

    def synchronize(self) -> None:
        if not self.is_done:
            if self._before is not None:
                self._before.synchronize()
                self._before = None
            self._into.copy_(self._source)
            self.is_done = True

    def seconds(self) -> float:
        assert self.is_done
        return self._link_s


class StandIn:
    """`Device` in tests: `size` bytes, of which `room` can be had, and copies that take up to `slowness` questions, or
    `link_s` seconds if they are asked.
    """

    name = "a stand-in"
    place = PLACE
    others = 0

    def __init__(self, *, size: int = 1 << 30, slowness: int = 3, can_pin: bool = True) -> None:
        self.size = size
        self.is_pinned = False
        self.copies = 0
        self.link_s = 1e-3
        self.host_slots: int | None = None
        self.room = size
        self.unsupported: set[torch.dtype] = set()
        self._slowness = slowness
        self.can_pin = can_pin
        self._chance = random.Random(0)
        self._last: StandInCopy | None = None
        self._thread = threading.current_thread()

    def memory(self) -> tuple[int, int]:
        return self.size, self.size

    def peak_bytes(self) -> int:
        return 0

    def computes(self, dtype: torch.dtype) -> bool:
        return dtype not in self.unsupported

    def allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.room:
            raise torch.OutOfMemoryError(f"{nbytes} of {self.room} bytes")
        return torch.full((nbytes,), 255, dtype=torch.uint8, device=PLACE)

    def free(self) -> None:
        pass

    def pin(self, memory: torch.Tensor) -> bool:
        assert memory.device == _CPU
        assert not self.is_pinned
        self.is_pinned = self.can_pin
        return self.can_pin

    def unpin(self, memory: torch.Tensor) -> None:
        assert self._last is None or self._last.is_done
        self.is_pinned = False

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> StandInCopy:
        assert (into.device, source.device, into.shape) == (PLACE, _CPU, source.shape)
        assert threading.current_thread() is self._thread
        self.copies += 1
        patience = self._chance.randint(0, self._slowness)
        self._last = StandInCopy(into, source, patience, self._last, self.link_s)
        return self._last
