"""One process of `bench`: loads a model in one of the systems, answers requests, and reports what that took.

Reads a `systems.Job` on standard input and writes one line of JSON. A process of its own per run, so that one limit
holds for all of its memory and nothing is left of the run before. Knows nothing of limits, repetitions or rates.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

import moeinf

from . import memory
from .engine import Engine
from .errors import MoeinfError
from .generation import Sampling, make_generation_config
from .hooks import quiet
from .recorder import Recorder
from .replay import Replay
from .systems import Counts, Job, Request, Run, Survey
from .testing import RANDOM_KEY
from .trace import ModelIdentity
from .tracefile import read_trace, write_trace

__all__ = ["run", "survey"]

_PACKED_TOKENS = 512
"""Recorded routing is packed between requests; in one that is longer, whenever so many tokens have run."""

Answer = Callable[[Request, int, "_Clock"], list[int]]
"""Continues a request, with the seed that is given; the clock is told of every token."""


@dataclass(slots=True)
class _Clock:
    """Times of one request: its begin, and when each token was there. `on_first` is called with the first."""

    on_first: Callable[[], None] = lambda: None
    times: list[float] = field(default_factory=lambda: [time.perf_counter()])

    def tick(self, _token: int = 0) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.on_first()


def run(job: Job) -> Run:
    """Do what the job says. Raises what the system raises."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    begin = time.perf_counter()
    match job.system:
        case "moeinf":
            with moeinf.load(job.model, **job.engine) as engine:
                return _Moeinf(engine, job).measure(time.perf_counter() - begin)
        case "llama.cpp":
            answer: Answer = _llama(job)
        case _:
            answer = _transformers(job)
    return _measure(job, answer, time.perf_counter() - begin)


def survey(job: Job, texts: Sequence[str], prompt_tokens: int) -> Survey:
    """Load the model as the job says, and look. Of each text the first `prompt_tokens` tokens are taken."""
    with moeinf.load(job.model, **job.engine) as engine:
        plan, config, stats = engine.plan, engine.model.config, engine.stats()
        with quiet():  # transformers warns of long prompts
            prompts = [engine.tokenizer(text)["input_ids"][:prompt_tokens] for text in texts]
        return Survey(
            budget=plan.budget,
            total=plan.total,
            libraries=stats.memory.libraries,
            slots=plan.most_slots,
            token_experts=plan.token_experts,
            thrashes=plan.thrashes_with(plan.most_slots),
            regime=plan.regime,
            context=plan.context,
            vocabulary=config.get_text_config(decoder=True).vocab_size,
            random=getattr(config, RANDOM_KEY, ""),
            quantization=stats.quantization,
            quality=asdict(stats.quality) if stats.quality else None,
            device=str(engine.device.place) if engine.device else "",
            notes=list(engine.notes),
            prompts=prompts,
        )


def _measure(job: Job, answer: Answer, load_s: float, on_first: Callable[[], None] = lambda: None) -> Run:
    for seed, request in enumerate(job.warm_up):
        answer(request, len(job.requests) + seed, _Clock())
    tokens, first, later = [], [], []
    for seed, request in enumerate(job.requests):
        clock = _Clock(on_first)
        tokens.append(answer(request, seed, clock))
        intervals = [after - before for before, after in pairwise(clock.times)]
        first.append(intervals[0])
        later += intervals[1:]
    read = sum(len(request.prompt) for request in job.requests)
    return Run(tokens, first, later, read, load_s, memory.peak_rss_bytes())


def _sampling(request: Request, temperature: float, seed: int) -> Sampling:
    return Sampling(max_tokens=request.tokens, temperature=temperature, top_p=1.0, top_k=0, seed=seed)


def _replay(job: Job, model: nn.Module) -> Replay | None:
    if not job.trace:
        return None
    sequences = list(read_trace(Path(job.trace)).sequences())
    return Replay(sequences, [model.get_submodule(name) for name in job.modules])


class _Moeinf:
    """moeinf itself, and what it counts while it answers."""

    def __init__(self, engine: Engine, job: Job) -> None:
        engine.learns = False  # or each run would know what the one before was asked
        engine.generation_config.eos_token_id = None
        self._engine = engine
        self._job = job
        self._replay = _replay(job, engine.model)
        if self._replay is not None and not self._replay.foresees:
            engine.runtime.leave_out("gate")  # it would ask a router that nobody follows
        self._sums: dict[str, Any] = dict.fromkeys(
            ("requests", "hits", "waits", "missed_bytes", "read_bytes", "prefill_read_bytes", "stall_s"), 0
        )
        self._sums |= dict.fromkeys(("prefill_stall_s", "prefetched", "prefetch_used"), 0)
        self._prefill = (0, 0.0)
        self._recorder = engine.runtime.recorder = (
            Recorder(ModelIdentity.of(job.model, engine.manifest), packed_tokens=_PACKED_TOKENS)
            if job.routing
            else None
        )

    def measure(self, load_s: float) -> Run:
        run = _measure(self._job, self._answer, load_s, self._prefill_ended)
        stats = self._engine.stats()
        counts = Counts(
            **self._sums,
            token_bytes=_token_bytes(self._engine.model),
            slots=stats.experts.slots,
            memory=asdict(stats.memory),
            predictor=stats.prefetch.predictor,
            kernels=stats.kernels,
        )
        if self._recorder is not None:
            write_trace(self._recorder.trace(), Path(self._job.routing))
        return Run(run.tokens, run.ttft_s, run.token_s, run.prompt_tokens, load_s, stats.memory.peak_rss, counts)

    def _answer(self, request: Request, seed: int, clock: _Clock) -> list[int]:
        if self._replay is not None and request.sequence is not None:
            self._replay.begin(request.sequence, request.first)
        sampling = _sampling(request, self._job.temperature, seed)
        clock.times[:] = [time.perf_counter()]
        completion = self._engine.session().generate(request.prompt, sampling, on_token=clock.tick)
        if self._recorder is not None:
            self._recorder.pack()  # nobody's time is taken now
        if seed < len(self._job.requests):
            self._add()
        return list(completion.tokens)

    def _prefill_ended(self) -> None:
        traffic = self._engine.runtime.traffic
        self._prefill = (traffic.disk_bytes, traffic.stall_s)

    def _add(self) -> None:
        decode, traffic = self._engine.runtime.decode, self._engine.runtime.traffic
        read_bytes, stall_s = self._prefill
        size = self._engine.manifest.layout.nbytes
        for name, value in {
            "requests": decode.requests,
            "hits": decode.hits,
            "waits": decode.waits,
            "missed_bytes": (decode.misses - decode.passed_by + decode.prefetch_used) * size,
            "read_bytes": traffic.disk_bytes - read_bytes,
            "prefill_read_bytes": read_bytes,
            "stall_s": traffic.stall_s - stall_s,
            "prefill_stall_s": stall_s,
            "prefetched": decode.prefetched,
            "prefetch_used": decode.prefetch_used,
        }.items():
            self._sums[name] += value


def _token_bytes(model: nn.Module) -> int:
    """Bytes of dense weights that every token reads: all but the table of input embeddings, of which it reads a row."""
    untyped: Any = model
    table, head = untyped.get_input_embeddings(), untyped.get_output_embeddings()
    total = sum(parameter.nbytes for parameter in model.parameters())
    is_tied = head is not None and any(each.data_ptr() == table.weight.data_ptr() for each in head.parameters())
    return total if is_tied else total - int(table.weight.nbytes)


class _Streamer(BaseStreamer):
    """Tells a clock of tokens; what `generate` streams first is the prompt."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            self._clock.tick()
        self._saw_prompt = True

    def end(self) -> None:
        pass


def _transformers(job: Job) -> Answer:
    """transformers alone, with mapped weights, or with accelerate's offload. All compute experts one by one ("eager"),
    which rounds as moeinf does; transformers' default rounds otherwise, and is as fast (docs/bench.md).
    """
    with quiet():
        auto: Any = AutoModelForCausalLM
        options = _offload(job) if job.system == "accelerate" else {}
        model = auto.from_pretrained(job.folder, dtype="auto", local_files_only=True, **options)
    if job.system == "transformers" and job.device:
        model.to(job.device)
    elif job.system == "transformers":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()  # as loaded, it may be a map of the file
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    replay = _replay(job, model)

    def answer(request: Request, seed: int, clock: _Clock) -> list[int]:
        if replay is not None and request.sequence is not None:
            replay.begin(request.sequence, request.first)
        sampling = _sampling(request, job.temperature, seed)
        config = make_generation_config(model.generation_config, sampling, request.tokens)
        torch.manual_seed(seed)
        prompt = torch.tensor([request.prompt], device=job.device or "cpu")
        mask = torch.ones_like(prompt)
        clock.times[:] = [time.perf_counter()]
        with torch.inference_mode(), quiet():
            output = model.generate(prompt, attention_mask=mask, generation_config=config, streamer=_Streamer(clock))
        made: list[int] = output[0, len(request.prompt) :].tolist()
        return made

    return answer


def _offload(job: Job) -> dict[str, Any]:
    """accelerate's device map: the first layers' experts in memory, as many as fit, the others on disk; or the former
    in a GPU's memory and the latter in the host's.
    """
    config = AutoConfig.from_pretrained(job.folder, local_files_only=True)
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        blank = auto.from_config(config)
    elsewhere = set(job.modules[job.resident_layers :])
    if job.device:
        return {"device_map": dict(_placed(blank, elsewhere, job.device, "cpu")) if elsewhere else job.device}
    if not elsewhere:
        return {}
    return {"device_map": dict(_placed(blank, elsewhere, "cpu", "disk")), "offload_folder": job.scratch}


def _placed(
    model: nn.Module, elsewhere: set[str], here: str, there: str, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Modules named in `elsewhere` there, all others here, no module named that holds both."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if path in elsewhere:
            yield path, there
        elif any(other.startswith(f"{path}.") for other in elsewhere):
            yield from _placed(child, elsewhere, here, there, f"{path}.")
        else:
            yield path, here


def _llama(job: Job) -> Answer:
    from llama_cpp import Llama

    longest = max(len(request.prompt) + request.tokens for request in (*job.warm_up, *job.requests))
    model = Llama(
        model_path=job.folder, n_ctx=longest, n_threads=job.threads, n_threads_batch=job.threads, verbose=False
    )

    def answer(request: Request, seed: int, clock: _Clock) -> list[int]:
        model.reset()
        model.set_seed(seed)
        clock.times[:] = [time.perf_counter()]
        made: list[int] = []
        for token in model.generate(request.prompt, temp=job.temperature, top_k=0, top_p=1.0, repeat_penalty=1.0):
            clock.tick()
            made.append(token)
            if len(made) == request.tokens:
                break
        return made

    return answer


@contextmanager
def _stdout_is_for_the_answer() -> Iterator[Callable[[object], None]]:
    """What libraries print goes to stderr."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        yield lambda answer: print(json.dumps(answer), file=stdout)  # the answer
    finally:
        sys.stdout = stdout


def main() -> None:
    """Do one job: `{"job": Job}`, with "texts" and "prompt_tokens" for a survey."""
    asked = json.loads(sys.stdin.read())
    job = Job.from_json(asked["job"])
    with _stdout_is_for_the_answer() as say:
        try:
            if "texts" in asked:
                say({"answer": asdict(survey(job, asked["texts"], asked["prompt_tokens"]))})
            else:
                say({"answer": asdict(run(job))})
        except MoeinfError as error:
            say({"error": type(error).__name__, "message": str(error), "hint": error.hint})


if __name__ == "__main__":
    main()
