"""`python -m moeinf`, and `moeinf`."""

import gc
import signal
import sys

__all__ = ["main"]

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Libraries make some 350,000 objects for good while they are imported, which Python would go through again and again
(docs/experiments.md). An answer leaves a few hundred in cycles, none of them a tensor.
"""


def main() -> int:
    """The command line of this process. Until its code is there, Ctrl-C ends the process as it ends others."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    from .cli import main as run

    try:
        return run()
    finally:
        gc.freeze()  # or Python would go through all of them once more before it ends


if __name__ == "__main__":
    sys.exit(main())
