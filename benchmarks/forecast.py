"""Whether `moeinf profile MODEL` is right: what it predicts, beside what the engine then does.

    moeinf profile                                   # measures the machine first; with MOEINF_HOME=FOLDER/home
    python benchmarks/forecast.py --folder FOLDER    # needs root, for the cgroup
    python benchmarks/forecast.py --settings small:25%:bfloat16 qwen3-30b-a3b:50%:bfloat16 --layers 4

For each setting (shape, share of the experts, dtype, or what its experts are packed as) it takes a random checkpoint
of the shape, or the demo model, records a trace of it once, and runs one process in a memory cgroup that holds the plan
and little more. The process makes the forecast from the traced hit curve, without corrections, then loads the engine
with the same options, puts a prompt through it, and decodes. Another process has the plan for its budget, so that no
step is longer than the plan has room for, and reads prompts of many lengths one after another, since what libraries
keep of each fills up with use. Prints times per token and to the first one, and the peak of memory beside the plan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.pop(0)  # or transformers takes the kernels.py beside this for the package of that name

from moeinf.cgroups import memory_limit, run_in
from moeinf.settings import tune_libraries
from moeinf.units import MIB

LIBRARIES_BYTES = 700 * MIB
"""What Python, torch and transformers take in the cgroup beside the plan, with some page cache."""
SETTINGS = (
    *(f"small:{share}:bfloat16" for share in ("15%", "25%", "50%", "75%", "100%")),
    *(f"small:{share}:{kind}" for kind in ("float32", "lossless", "int4") for share in ("25%", "100%")),
    *(f"demo:{share}:bfloat16" for share in ("25%", "100%")),
)
PACKED = ("lossless", "int8", "int4")
TRACED_TOKENS = 400
HELD_PROMPTS = (7, 100, 1500, 333, 777, 1990)
CONTEXT = 2048


@dataclass(frozen=True)
class Setting:
    shape: str
    share: str
    dtype: str

    @property
    def model(self) -> str:
        return self.shape if self.shape == "demo" else f"{self.shape}-{self.dtype}"


@dataclass(frozen=True)
class Result:
    """Predicted and measured."""

    verdict: str
    slots: int
    hit_rate: tuple[float, float]
    tpot_s: tuple[float, float]
    ttft_s: tuple[float, float]
    bound_s: float
    by: str


@dataclass(frozen=True)
class Held:
    """The plan, and a process's peak less what it held before the model."""

    plan_bytes: int
    held_bytes: int


def prepare(setting: Setting, folder: Path, layers: int | None) -> None:
    """Pull the model and record a trace of it, unless that was done before."""
    from moeinf.pull import pull
    from moeinf.store import Store
    from moeinf.testing import SHAPES, write_checkpoint

    if setting.model not in Store().names():
        if setting.shape == "demo":
            pull("demo", store=Store())
        else:
            checkpoint, is_packed = folder / setting.shape, setting.dtype in PACKED
            if not checkpoint.exists():
                write_checkpoint(SHAPES[setting.shape].config(layers), checkpoint, setting.shape)
            experts, dtype = (setting.dtype, "auto") if is_packed else (None, setting.dtype)
            pull(str(checkpoint), store=Store(), name=setting.model, experts=experts, dtype=dtype)
    subprocess.run([sys.executable, __file__, "--worker", "record", *_words(setting)], check=True)


def record(setting: Setting) -> None:
    """Keep the routing of one long answer beside the model."""
    import moeinf
    from moeinf.recorder import Recorder
    from moeinf.store import TRACES_FOLDER, Store
    from moeinf.trace import ModelIdentity
    from moeinf.tracefile import write_trace

    path = Store().path(setting.model) / TRACES_FOLDER / "forecast.safetensors"
    if path.exists():
        return
    with moeinf.load(setting.model, context=CONTEXT) as engine:
        recorder = Recorder(ModelIdentity.of(setting.model, engine.manifest))
        engine.runtime.recorder = recorder
        _answer(engine, list(range(5, 37)), TRACED_TOKENS, seed=2)
    write_trace(recorder.trace(), path)


def predict_and_run(setting: Setting, prompt_tokens: int, new_tokens: int, threads: int) -> Result:
    import moeinf
    from moeinf import evidence, memory
    from moeinf.forecast import Situation
    from moeinf.ledger import can_cache_files
    from moeinf.outlook import look_ahead
    from moeinf.placement import place
    from moeinf.planning import find_curve, find_subject
    from moeinf.settings import EngineOptions
    from moeinf.store import Store

    store = Store()
    machine = evidence.read_machine(store.home)
    if machine is None:
        sys.exit(
            f"{store.home / evidence.MACHINE_FILE} is not there: run `moeinf profile` with MOEINF_HOME={store.home}"
        )
    options = EngineOptions(experts=setting.share, context=CONTEXT, threads=threads)
    subject = find_subject(setting.model, store)
    curve = find_curve(subject, options.policy)
    placement = place(subject.manifest, subject.shape, options)
    plan = placement.plan
    situation = Situation(
        machine,
        placement.manifest,
        placement.shape,
        curve,
        kernels=options.kernels,
        prefetch=options.prefetch,
        reads_files=can_cache_files(plan, subject.manifest, memory.available_bytes()),
    )
    outlook = look_ahead(situation, plan, prompt_tokens=prompt_tokens)
    expected = outlook.forecast
    with moeinf.load(setting.model, **asdict(options)) as engine:
        assert engine.plan.slots == plan.slots
        first = _answer(engine, [5 + number % 90 for number in range(prompt_tokens)], new_tokens, seed=3).stats
        second = _answer(engine, list(range(7, 39)), new_tokens, seed=1).stats
        decode = engine.runtime.decode
        found = 1 - (decode.misses + decode.prefetch_used) / decode.requests
    return Result(
        outlook.verdict,
        plan.slots,
        (expected.hit_rate, found),
        (expected.tpot_s, second.tpot_s),
        (expected.ttft_s, first.ttft_s),
        expected.bound_s,
        expected.by,
    )


def hold(setting: Setting, new_tokens: int, threads: int) -> Held:
    """Read prompts of many lengths within the plan."""
    import moeinf

    plan_bytes = plan_total(setting)
    budget = str(plan_bytes)
    with moeinf.load(
        setting.model, host_memory=budget, experts=setting.share, context=CONTEXT, threads=threads
    ) as engine:
        engine.learns = False
        for tokens in HELD_PROMPTS:
            prompt = [5 + number * tokens % 89 for number in range(tokens)]
            memory = _answer(engine, prompt, min(new_tokens, CONTEXT - tokens), seed=tokens).stats.memory
    return Held(plan_bytes, memory.peak_rss - memory.libraries)


def _answer(engine: Any, prompt: list[int], tokens: int, seed: int) -> Any:
    from moeinf.generation import Sampling

    engine.generation_config.eos_token_id = None
    sampling = Sampling(max_tokens=tokens, temperature=1.0, top_p=1.0, top_k=0, seed=seed)
    return engine.session().generate(prompt, sampling)


def _words(setting: Setting) -> list[str]:
    return ["--settings", f"{setting.shape}:{setting.share}:{setting.dtype}"]


def plan_total(setting: Setting) -> int:
    """Bytes of the setting's plan."""
    from moeinf.placement import place
    from moeinf.planning import find_subject
    from moeinf.settings import EngineOptions
    from moeinf.store import Store

    subject = find_subject(setting.model, Store())
    return place(subject.manifest, subject.shape, EngineOptions(experts=setting.share, context=CONTEXT)).plan.total


def limit_bytes(setting: Setting) -> int:
    """The plan of the setting, and what the libraries need; rather too little for the page cache."""
    needed = plan_total(setting) + LIBRARIES_BYTES
    return needed + needed // 20


def measure(setting: Setting, arguments: argparse.Namespace) -> str:
    """A row of the table, of two processes in a cgroup, each with a cold page cache; what went wrong if it did."""
    head = f"| {setting.shape} | {setting.share} | {setting.dtype} "
    answers = []
    for worker in ("run", "hold"):
        command = [sys.executable, __file__, "--worker", worker, *_words(setting), "--folder", str(arguments.folder)]
        command += ["--prompt", str(arguments.prompt), "--tokens", str(arguments.tokens)]
        command += ["--threads", str(arguments.threads)]
        Path("/proc/sys/vm/drop_caches").write_text("3")
        with memory_limit(limit_bytes(setting)) as cgroup:
            done = run_in(cgroup, command)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
        if done.returncode:
            return f"{head}| exit {done.returncode}: {lines[-1]} |"
        answers.append(json.loads(lines[-1]))
    return head + row(Result(**answers[0]), Held(**answers[1]))


def row(result: Result, held: Held) -> str:
    pairs = [
        "{:.2f} / {:.2f}".format(*result.hit_rate),
        "{:.1f} / {:.1f} ms: {:.2f}".format(*(s * 1e3 for s in result.tpot_s), result.tpot_s[1] / result.tpot_s[0]),
        "{:.2f} / {:.2f} s: {:.2f}".format(*result.ttft_s, result.ttft_s[1] / result.ttft_s[0]),
        f"{result.bound_s * 1e3:.1f} ms ({result.by})",
        f"{held.held_bytes / held.plan_bytes:.0%} of {held.plan_bytes / MIB:.0f} MiB",
    ]
    return f"| {result.verdict} | {' | '.join(pairs)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), metavar="SHAPE:SHARE:DTYPE")
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="where checkpoints and the store go")
    parser.add_argument("--layers", type=int, help="of checkpoints that are written; default: as many as usual")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens that are decoded")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", choices=("record", "run", "hold"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = [Setting(*text.split(":")) for text in arguments.settings]
    if arguments.worker == "record":
        record(settings[0])
        return
    if arguments.worker == "run":
        result = predict_and_run(settings[0], arguments.prompt, arguments.tokens, arguments.threads)
        print(json.dumps(asdict(result)))
        return
    if arguments.worker == "hold":
        print(json.dumps(asdict(hold(settings[0], arguments.tokens, arguments.threads))))
        return
    arguments.folder = arguments.folder.resolve()
    os.environ["MOEINF_HOME"] = str(arguments.folder / "home")
    tune_libraries()
    print("| shape | experts | dtype | verdict | hit rate | a token | first token | bound | memory |")
    print("|---|---|---|---|---|---|---|---|---|\n| | | | | predicted / measured | predicted / measured: ratio | | | |")
    for setting in settings:
        prepare(setting, arguments.folder, arguments.layers)
        print(measure(setting, arguments), flush=True)


if __name__ == "__main__":
    main()
