"""Decode with every expert in memory: native kernels against torch's, in turn in one process.

    python benchmarks/resident.py                       # the small shape
    python benchmarks/resident.py --shape qwen3-30b-a3b
    python benchmarks/resident.py --prompt 4000         # behind so many tokens

Loads the same random checkpoint twice, once per kind of kernels, and lets both decode the same tokens in turn. Says
whether they produced the same ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

sys.path.pop(0)  # or transformers takes the kernels.py beside this for the package of that name

from moeinf.generation import Sampling, Session
from moeinf.testing import SHAPES, write_checkpoint

KINDS = ("torch", "native")


def decode(session: Session, prompt: list[int], new_tokens: int) -> tuple[list[float], list[int]]:
    """(times per token after the first, tokens): sampled with a fixed seed, since greedy decoding of a random model
    falls into a loop.
    """
    times: list[float] = []
    sampling = Sampling(max_tokens=new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=1)
    completion = session.generate(prompt, sampling, on_token=lambda _: times.append(time.perf_counter()))
    return [after - before for before, after in pairwise(times)], list(completion.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="where checkpoints and the store go")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per run")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    os.environ["MOEINF_HOME"] = str(folder / "home")
    write_checkpoint(SHAPES[arguments.shape].config(), folder / arguments.shape, arguments.shape)
    if not (folder / "home/models" / arguments.shape).exists():
        pull = ["pull", str(folder / arguments.shape), "--name", arguments.shape, "--experts", "bf16", "-q"]
        subprocess.run([sys.executable, "-m", "moeinf", *pull], check=True)
    import moeinf

    prompt = [5 + token % 90 for token in range(arguments.prompt)]
    context = arguments.prompt + arguments.tokens
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens: dict[str, list[int]] = {}
    with ExitStack() as stack:
        engines = {
            kind: stack.enter_context(
                moeinf.load(arguments.shape, experts="100%", context=context, kernels=kind, threads=arguments.threads)
            )
            for kind in KINDS
        }
        sessions = {kind: engine.session() for kind, engine in engines.items()}
        for session in sessions.values():
            decode(session, prompt, arguments.tokens)  # every expert it will need is in memory afterwards
        for _ in range(arguments.repeats):
            for kind, session in sessions.items():
                found, tokens[kind] = decode(session, prompt, arguments.tokens)
                times[kind] += found
    medians = {kind: statistics.median(figures) for kind, figures in times.items()}
    for kind in KINDS:
        spread = f"{min(times[kind]) * 1e3:.1f}..{max(times[kind]) * 1e3:.1f}"
        print(f"{kind:7} {medians[kind] * 1e3:7.1f} ms per token, {spread}")
    print(f"torch / native: {medians['torch'] / medians['native']:.2f} times the time per token")
    print(f"all produced the same tokens: {tokens['torch'] == tokens['native']}")


if __name__ == "__main__":
    main()
