"""Decode from models that do not fit, beside what else runs the same weights in the same memory: what
docs/performance.md has of that, one shape after the other.

    python benchmarks/streaming.py --folder FOLDER                          # needs root, for the cgroup, and some 65 GB
    python benchmarks/streaming.py --folder FOLDER --shapes small --experts lossless

Writes a random checkpoint of the shape to FOLDER, pulls it into FOLDER/home, and has `moeinf bench` run moeinf,
transformers with its weights mapped, and accelerate's disk offload in turn, in a cgroup that holds the dense weights, a
quarter of the experts and 1 GiB (the small shape: 1600 MiB in all). moeinf has answered once before, as a model has
that is in use: `--prefetch auto` then knows what pays. `bench` says what the disk gave, and what bounds a token by
that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.pop(0)  # or transformers takes the kernels.py beside this for the package of that name

from moeinf.store import Store
from moeinf.testing import SHAPES, write_checkpoint
from moeinf.units import GIB, MIB

LAYERS = {"small": 16, "qwen3-30b-a3b": 12, "mixtral-8x7b": 4}
SMALL_BYTES = 1600 * MIB
LIBRARIES_BYTES = 360 * MIB
"""What Python and the libraries take of the cgroup, at most: `bench` adds what they do take to the budget."""
RIVALS = ("mmap", "accelerate")


def prepare(shape: str, experts: str | None, folder: Path, store: Store) -> str:
    """The name of the model, pulled now if it was not yet."""
    name = shape if experts is None else f"{shape}-{experts}"
    if name not in store.names():
        checkpoint = folder / shape
        write_checkpoint(config_of(shape), checkpoint, shape)
        moeinf("pull", str(checkpoint), "--name", name, "--experts", experts or "bf16", home=store.home)
    return name


def config_of(shape: str) -> Any:
    """With the share of its vocabulary that it has of its layers: the output layer takes the part of a token that it
    takes in the model.
    """
    model, layers = SHAPES[shape], LAYERS[shape]
    return model.config(layers, vocabulary=model.fields["vocab_size"] * layers // model.layers)


def budget(name: str, shape: str, store: Store) -> int:
    """Bytes for everything but the libraries: what plain weights take decides, however the store has them."""
    manifest = store.open(name).manifest.unpacked
    plain = manifest.num_experts * manifest.layout.plain_bytes
    limit = SMALL_BYTES if shape == "small" else manifest.dense_bytes + plain // 4 + GIB
    return limit - LIBRARIES_BYTES


def moeinf(*arguments: str, home: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "moeinf", *arguments], check=True, env={**os.environ, "MOEINF_HOME": str(home)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--experts", choices=("lossless", "int8", "int4"), help="as `pull` takes it")
    parser.add_argument("--against", default=",".join(RIVALS), help="quantised experts: nobody, or llama.cpp")
    parser.add_argument("--repeat", default="3")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    store = Store(asked.folder / "home")
    for shape in asked.shapes:
        name = prepare(shape, asked.experts, asked.folder, store)
        against = ["--against", asked.against] if asked.against else []
        what = [
            "--prompts",
            "1",
            "--prompt-tokens",
            "32",
            "--tokens",
            "48",
            "--temperature",
            "1",
            "--repeat",
            asked.repeat,
        ]
        memory = ["--host-memory", str(budget(name, shape, store))]
        moeinf("run", name, "Once upon a time", "--max-tokens", "48", "--temperature", "1", *memory, home=store.home)
        moeinf("bench", name, *memory, *what, *against, home=store.home)


if __name__ == "__main__":
    main()
