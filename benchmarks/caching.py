"""What the cache's policies, prefetching and learning are worth on the demo model, on texts that it was not tuned on.

    python benchmarks/caching.py modes       # hit rates and times of every policy and prefetch mode
    python benchmarks/caching.py auto        # --prefetch auto beside off, in turn: what it costs or gains
    python benchmarks/caching.py warm        # the first tokens of an answer, with and without what was learned
    python benchmarks/caching.py recording   # what recording the routing costs

Makes a home of its own in a temporary folder. `modes` and `auto` begin with an empty collection; `warm` learns one from
the set `default` first. Texts come from the set `default-held-out`, one domain after the other; sampling has a seed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.pop(0)  # or transformers takes the kernels.py beside this for the package of that name

import torch

import moeinf
from moeinf.cache import CacheCounters
from moeinf.datasets import read_prompts
from moeinf.generation import Sampling
from moeinf.policies import POLICIES
from moeinf.recorder import Recorder
from moeinf.simulate import BELADY, events, replay
from moeinf.store import TRACES_FOLDER, Store
from moeinf.trace import ModelIdentity, Trace

MODEL = "demo"
MODES = ("off", "gate", "eam", "auto")
SIZES = ("10%", "25%", "50%")
FIRST_TOKENS = 32


@contextmanager
def engine(**options: object) -> Iterator[moeinf.Engine]:
    """The demo model, loaded; what it learns is not kept."""
    with moeinf.load(MODEL, threads=1, **options) as loaded:  # type: ignore[arg-type]
        loaded.learns = False
        loaded.generation_config.eos_token_id = None
        yield loaded


def answer(loaded: moeinf.Engine, prompt: list[int], tokens: int) -> moeinf.Completion:
    sampling = Sampling(max_tokens=tokens, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    return loaded.session().generate(prompt, sampling)


def prompts(count: int, dataset: str = "default-held-out") -> list[list[int]]:
    with engine() as loaded:
        return [loaded.tokenizer(prompt.text)["input_ids"][:256] for prompt in read_prompts(dataset, count)]


def modes(texts: Sequence[list[int]], tokens: int) -> None:
    print("| size | policy | prefetch | found in memory | on its way | ms per token |\n|---|---|---|--:|--:|--:|")
    trace = _record(texts, tokens)
    for size in SIZES:
        slots = round(sum(trace.layer_sizes) * int(size[:-1]) / 100)
        bound = replay(list(events(trace)), trace.layer_sizes, BELADY, slots)
        print(f"| {size} | {BELADY} | | {bound.hit_rate:.1%} | | |", flush=True)
        for policy in sorted(POLICIES):
            for mode in MODES:
                with engine(experts=str(slots), policy=policy, prefetch=mode) as loaded:
                    counters, times = CacheCounters(), []
                    for text in texts:
                        times.append(answer(loaded, text, tokens).stats.tpot_s)
                        counters.hits += loaded.runtime.decode.hits
                        counters.waits += loaded.runtime.decode.waits
                        counters.misses += loaded.runtime.decode.misses
                print(
                    f"| {size} | {policy} | {mode} | {counters.hits / counters.requests:.1%}"
                    f" | {counters.waits / counters.requests:.1%} | {statistics.median(times) * 1000:.2f} |",
                    flush=True,
                )


def _record(texts: Sequence[list[int]], tokens: int) -> Trace:
    with engine(prefetch="off") as loaded:
        recorder = Recorder(ModelIdentity.of(MODEL, loaded.manifest))
        loaded.runtime.recorder = recorder
        for text in texts:
            answer(loaded, text, tokens)
        return recorder.trace()


def in_turn(texts: Sequence[list[int]], tokens: int, **kinds: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds per token of each kind, text by text, who begins changing each time."""
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number, text in enumerate(texts):
        for kind in sorted(kinds, reverse=bool(number % 2)):
            loaded = kinds[kind]()
            assert isinstance(loaded, moeinf.Engine)
            times[kind].append(answer(loaded, text, tokens).stats.tpot_s)
    return times


def auto(texts: Sequence[list[int]], tokens: int) -> None:
    for size in (*SIZES, "100%"):
        with engine(experts=size, prefetch="off") as off, engine(experts=size, prefetch="auto") as on:
            times = in_turn(texts, tokens, off=lambda off=off: off, auto=lambda on=on: on)  # type: ignore[misc]
        _compare(f"{size} of the experts", times, "off", "auto")


def recording(texts: Sequence[list[int]], tokens: int) -> None:
    with engine(experts="100%", prefetch="off") as loaded:
        identity = ModelIdentity.of(MODEL, loaded.manifest)

        def without() -> moeinf.Engine:
            loaded.runtime.recorder = None
            return loaded

        def with_recorder() -> moeinf.Engine:
            loaded.runtime.recorder = Recorder(identity)
            return loaded

        for text in texts:
            answer(loaded, text, 4)
        times = in_turn(texts, tokens, without=without, recording=with_recorder)
    _compare("all experts resident", times, "without", "recording")


def _compare(what: str, times: dict[str, list[float]], one: str, other: str) -> None:
    ratios = [second / first for first, second in zip(times[one], times[other], strict=True)]
    print(
        f"{what}: {one} {statistics.median(times[one]) * 1000:.2f} ms, {other}"
        f" {statistics.median(times[other]) * 1000:.2f} ms per token; ratio of pairs: median"
        f" {statistics.median(ratios):.3f}, of sums {sum(times[other]) / sum(times[one]):.3f}",
        flush=True,
    )


def warm(texts: Sequence[list[int]], tokens: int) -> None:
    """Every text is the first thing that an engine is asked, so that its cache is cold or warmed."""
    for text in prompts(216, "default"):
        _learn(text, tokens)
    path = Store().path(MODEL) / TRACES_FOLDER / "collection.safetensors"
    print(f"learned from the default set: {path.stat().st_size:,} bytes")
    print("| size | cold | cold, `eam` | warmed, `eam` | warmed, `auto` |\n|---|--:|--:|--:|--:|")
    for size in ("25%", "50%", "75%"):
        rates = []
        for is_warm, mode in ((False, "off"), (False, "eam"), (True, "eam"), (True, "auto")):
            hits = requests = 0
            for text in texts:
                with _put_away(path, not is_warm), engine(experts=size, prefetch=mode) as loaded:
                    answer(loaded, text[:32], FIRST_TOKENS)
                    hits += loaded.runtime.decode.hits
                    requests += loaded.runtime.decode.requests
            rates.append(f"{hits / requests:.1%}")
        print(f"| {size} | {' | '.join(rates)} |", flush=True)


_learner: list[moeinf.Engine] = []


def _learn(text: list[int], tokens: int) -> None:
    if not _learner:
        _learner.append(moeinf.load(MODEL, prefetch="off"))
    answer(_learner[0], text, tokens)
    _learner[0].save_collection()


@contextmanager
def _put_away(path: Path, is_away: bool) -> Iterator[None]:
    aside = path.with_suffix(".aside")
    if is_away:
        os.rename(path, aside)
    try:
        yield
    finally:
        if is_away:
            os.rename(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"modes": modes, "auto": auto, "warm": warm, "recording": recording}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--texts", type=int, default=28, help="how many texts")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens for each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        os.environ["MOEINF_HOME"] = home
        parts[arguments.part](prompts(arguments.texts), arguments.tokens)


if __name__ == "__main__":
    main()
