"""Every error that moeinf raises on purpose, and the exit code that the command line gives it.

    MoeinfError                1    unexpected, with the next step where there is one
    ├── UsageError             2    the request makes no sense: an unknown name, a bad size, two options that clash
    ├── ModelNotFoundError     3    the model or data set is unknown, or the model known and not pulled
    ├── IntegrityError         4    bytes on disk are not what the manifest or the format says
    ├── CapacityError          5    not enough disk or memory
    ├── HubError               6    network or permission at the hub
    └── UnsupportedError       7    moeinf cannot do this with this model, or refuses to for safety
        └── UnpackableError    7    these weights do not become smaller without loss

The class is chosen by what the caller does next. A message says what failed and on what; `hint` says what to do about
it, as a command to paste where there is one. An interrupt is no error: it stays KeyboardInterrupt (exit code 130).
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "HubError",
    "IntegrityError",
    "ModelNotFoundError",
    "MoeinfError",
    "UnsupportedError",
    "UsageError",
]


class MoeinfError(Exception):
    """Root of the tree above. `str(error)` is the message alone; `error.hint` the next step, or None."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(MoeinfError):
    exit_code = 2


class ModelNotFoundError(MoeinfError):
    exit_code = 3


class IntegrityError(MoeinfError):
    exit_code = 4


class CapacityError(MoeinfError):
    exit_code = 5


class HubError(MoeinfError):
    exit_code = 6


class UnsupportedError(MoeinfError):
    exit_code = 7


class UnpackableError(UnsupportedError):
    pass
