"""Compute devices that have memory of their own, and the way of bytes to them.

`Device` is the seam: CUDA through torch in the program, a stand-in on the CPU in tests. Nothing here waits for all that
a device was asked to do: copies go along a stream of their own, and events say how far they have come. Knows nothing of
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from .errors import UnsupportedError, UsageError
from .units import GIB

__all__ = ["Copy", "CudaDevice", "Device", "find_device", "is_out_of_memory"]

_cuda: Any = torch.cuda  # half of it is untyped
_ELSEWHERE = "give --device cpu to compute on the processor"
_REGISTERED_BYTES = 64 * GIB
"""Of host memory at a time: drivers since R580 refuse 512 GiB in a call (vLLM #51080)."""
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
"""What libraries say that take a GPU's memory past torch, when there is none."""


class Copy(Protocol):
    """Bytes on their way to a device."""

    def query(self) -> bool:
        """Whether they are there."""

    def synchronize(self) -> None:
        """Return when they are there."""

    def seconds(self) -> float:
        """What that took, when they are there; what it waited for before is left out."""


class Device(Protocol):
    """A device, which does what it is asked in the order in which it was asked, copies apart. One thread asks, the
    model's.

    `place` is what torch calls it, `name` what people do, `others` how many more there are that could be named.
    """

    place: torch.device
    name: str
    others: int

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""

    def peak_bytes(self) -> int:
        """The most that this process held there at a time."""

    def computes(self, dtype: torch.dtype) -> bool:
        """Whether it has arithmetic of this kind, not by way of another."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """So many bytes, [nbytes]. Raises torch.OutOfMemoryError."""

    def free(self) -> None:
        """Let others have the memory that nothing here uses any more."""

    def pin(self, rows: torch.Tensor) -> bool:
        """Let the device reach the rows of this host memory by itself, a copy not being of more than one, until
        `unpin`. Whether that could be had; without it copies are slower, and nobody else can go on meanwhile.
        """

    def unpin(self, rows: torch.Tensor) -> None:
        """The memory is the system's alone again. No copy from it may be under way."""

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        """Begin to copy host memory to the device, behind earlier copies and behind all that the device was asked to
        compute so far, which may still read what is overwritten.
        """


class _CudaCopy:
    """The events between which a stream copies."""

    def __init__(self, begin: Any, end: Any) -> None:
        self._begin = begin
        self._end = end
        self.query: Callable[[], bool] = end.query
        self.synchronize: Callable[[], None] = end.synchronize

    def seconds(self) -> float:
        milliseconds: float = self._begin.elapsed_time(self._end)
        return milliseconds / 1e3


class CudaDevice:
    """A GPU that torch calls CUDA, those of AMD included."""

    def __init__(self, index: int) -> None:
        self.place = torch.device("cuda", index)
        _cuda.set_device(self.place)
        self.name: str = _cuda.get_device_name(self.place)
        self.others: int = _cuda.device_count() - 1
        self._copies: Any = _cuda.Stream(self.place)

    def memory(self) -> tuple[int, int]:
        self.free()  # what torch keeps for itself would not be free
        return torch.cuda.mem_get_info(self.place)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.place)

    def computes(self, dtype: torch.dtype) -> bool:
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.place)

    def free(self) -> None:
        _cuda.empty_cache()

    def pin(self, rows: torch.Tensor) -> bool:
        # torch's own pinned memory comes in powers of two, which for most of the host's memory is too much to waste.
        pinned: list[torch.Tensor] = []
        for part in _parts(rows):
            if int(_cuda.cudart().cudaHostRegister(part.data_ptr(), part.nbytes, 0)):
                self._forget_error()
                self._unpin(pinned)
                return False
            pinned.append(part)
        return True

    def unpin(self, rows: torch.Tensor) -> None:
        self._unpin(_parts(rows))

    def _unpin(self, parts: Iterable[torch.Tensor]) -> None:
        for part in parts:
            if int(_cuda.cudart().cudaHostUnregister(part.data_ptr())):
                self._forget_error()

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> Copy:
        begin, end = (_cuda.Event(enable_timing=True) for _ in range(2))
        self._copies.wait_stream(_cuda.current_stream(self.place))
        with _cuda.stream(self._copies):
            begin.record(self._copies)
            into.copy_(source, non_blocking=True)
            end.record(self._copies)
        return _CudaCopy(begin, end)

    def _forget_error(self) -> None:
        """CUDA tells of an error once more when it is next asked for one, whoever asks."""
        try:
            torch.zeros(1, device=self.place)
        except RuntimeError:
            torch.zeros(1, device=self.place)


def _parts(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Whole rows, as many together as are registered in one call."""
    return torch.split(rows, max(1, _REGISTERED_BYTES // max(1, rows[0].nbytes)))


def find_device(name: str) -> Device | None:
    """The device that `--device NAME` means, None being the CPU; `auto` takes a GPU where torch finds one.

    Raises UsageError for a name or a number that is not there, UnsupportedError where torch cannot use any GPU, or not
    this one.
    """
    kind, _, number = name.partition(":")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return None
    if name not in ("auto", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise UsageError(f"--device {name} is not known", hint="choose one of: auto, cpu, cuda, cuda:N")
    if torch.version.cuda is None and torch.version.hip is None:
        raise UnsupportedError(
            f"--device {name}: this torch was built without CUDA",
            hint=f"install one with it (https://pytorch.org/get-started), or {_ELSEWHERE}",
        )
    try:
        _cuda.init()
    except RuntimeError as error:  # no driver, one too old, or no GPU: the message says which
        raise UnsupportedError(f"--device {name}: {str(error).splitlines()[0]}", hint=_ELSEWHERE) from error
    index, count = int(number or 0), torch.cuda.device_count()
    if index >= count:
        known = ", ".join(f"cuda:{each}" for each in range(count)) or "none"
        raise UsageError(f"--device {name} is not there", hint=f"the GPUs here: {known}; or {_ELSEWHERE}")
    try:
        device = CudaDevice(index)
        _compute_something(device.place)
    except RuntimeError as error:  # torch's build has nothing for it, or somebody else has it for himself
        raise UnsupportedError(f"--device {name}: {str(error).splitlines()[0]}", hint=_ELSEWHERE) from error
    return device


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device has no memory for what it was asked to do."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _compute_something(place: torch.device) -> None:
    """Have torch load what it computes with there, which takes memory of the device that torch does not count."""
    matrix = torch.ones(16, 16, device=place)
    (matrix @ matrix).sum().item()
