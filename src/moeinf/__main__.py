"""`python -m moeinf`, and `moeinf`."""

import signal
import sys

__all__ = ["main"]


def main() -> int:
    """The command line of this process. Until its code is there, Ctrl-C ends the process as it ends others."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
