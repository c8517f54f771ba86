"""The native library (kernels/csrc): where it is, and whether it can be called. Knows nothing of what it computes, or
of torch.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["NotNativeError", "Signature", "built_library", "load_library"]

_INTERFACE = 24
"""The number of moe.h."""

Signature = tuple[str, Any, tuple[Any, ...]]
"""A function of the library: its name, the type of its result, and those of its arguments."""


class NotNativeError(Exception):
    """The library is not there, or cannot compute something; the message says why."""


def built_library() -> Path | None:
    """Where the library is, if it was built with the package."""
    path = Path(__file__).parent / "kernels" / f"_moe{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.exists() else None


def load_library(functions: Iterable[Signature], path: Path | None = None) -> ctypes.CDLL:
    """The library at `path`, or the package's own, to call these functions of. Raises NotNativeError when it cannot be
    had.
    """
    path = path or built_library()
    if path is None:
        raise NotNativeError("the native library is not built; install moeinf where there is a C compiler")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotNativeError(f"the native library cannot be loaded: {error}") from error
    if library.moe_interface() != _INTERFACE:
        raise NotNativeError("the native library is of another version; install moeinf again")
    for name, result, arguments in functions:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
