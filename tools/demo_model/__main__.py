"""Command line of the demo model's workshop: `python -m tools.demo_model COMMAND`.

Every command lives in a module of its own with `add_arguments(parser)` and `run(arguments)`; only the module of the
command that was asked for is imported, so that fetching text does not need torch.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

COMMANDS = {
    "fetch": "download the source packages and check their hashes",
    "clean": "read the packages, generate the rest, write the corpus by domain and split",
    "tokenizer": "train the tokenizer on a balanced sample of the corpus",
    "encode": "turn the corpus into token files",
    "train": "train the model, or go on where it stopped",
    "evaluate": "measure losses, answers and routing",
    "export": "write the checkpoint as it ships",
    "prompts": "write the held-out prompt sets",
}


def default_work_folder() -> Path:
    """Folder of all working data: `$DEMO_WORK`, else `build/demo-model`."""
    return Path(os.environ.get("DEMO_WORK", "build/demo-model"))


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--work", type=Path, default=default_work_folder(), help="folder of all working data")
        if name == chosen:
            module = importlib.import_module(f"{__package__}.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    return int(arguments.run(arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
