"""Measure a model, beside what a person would run instead: processes in turn, under one limit, on the same weights.

Owns the order of the runs, what each is allowed, and the files that rivals read. Every run is a process of its own
(`worker`); what they say together is in `scores`. Knows nothing of terminals.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import errors, fused, hardware, memory
from .cgroups import memory_limit, run_in
from .collectionfile import COLLECTION_FILE, read_collection
from .errors import MoeinfError, UnsupportedError, UsageError
from .files import FileSystem, explained
from .ledger import parse_slots
from .locks import exclusive_lock
from .progress import NO_PROGRESS, Progress
from .prompts import text_digest
from .rates import Rates, measure_rates
from .replay import check_replay, recorded_layer
from .scores import Measured, Score, belady_hit_rate, mark_same_tokens
from .settings import EngineOptions, attend_alike, home_path, tune_libraries
from .store import TRACES_FOLDER, StoredModel
from .systems import Job, Request, Run, Survey
from .trace import ModelIdentity, Trace
from .tracefile import read_trace
from .units import KIB, format_bytes

__all__ = ["Report", "Wishes", "bench"]

Notify = Callable[[str], None]

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_MAPPED_READ_AHEAD = 128 * KIB
"""Mapped weights are read fastest at this read-ahead (docs/experiments.md)."""
_FIRST_TOKENS = 8
_FIRST_NEW_TOKENS = 4
"""What a cold process is asked before anything is measured: the first tokens also page in the libraries' code."""
_NO_LIMIT = "a GPU's memory has no limit that could be set"
_ON_DISK = ("transformers", "accelerate", "mmap")
"""Rivals that read a checkpoint as transformers writes it."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is to be measured.

    Args:
        engines: moeinf's options, one entry per setting. Rivals are run for each value of `experts` among them.
        rivals: some of `systems.RIVALS`.
        texts: what is put through the model; `prompts` of them are measured, those behind them warm it up.
        prompts, prompt_tokens, tokens: how many, how long at most, and how many new tokens for each.
        repeat: how many processes of each kind.
        starts: `cold`, `warm` or both.
        temperature: 0 takes the likeliest token.
        gguf: the file for llama.cpp.
        trace: recorded routing to replay.
    """

    engines: Sequence[EngineOptions]
    rivals: Sequence[str]
    texts: Sequence[str]
    prompts: int = 4
    prompt_tokens: int = 128
    tokens: int = 32
    repeat: int = 3
    starts: Sequence[str] = ("cold",)
    temperature: float = 0.0
    gguf: Path | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("prompt_tokens", 1), ("tokens", 2), ("repeat", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {getattr(self, name)} measures nothing", hint=f"give {least} or more")


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured. `unenforced` says why no limit was set, `replay` what was replayed; empty if neither.
    `prompts`: measured; `known_prompts`: of those, how many the model's collection was traced with.
    """

    model: str
    wishes: Wishes
    machine: dict[str, Any]
    random: str
    quantization: str
    quality: dict[str, Any] | None
    replay: dict[str, Any]
    prompts: int
    known_prompts: int
    unenforced: str
    drops_caches: bool
    same_tokens: bool
    scores: list[Score]

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        wishes = self.wishes
        return {
            "machine": self.machine,
            "model": self.model,
            "random_weights": self.random or None,
            "quantization": self.quantization or None,
            "quality": self.quality,
            "prompts": self.prompts,
            **{name: getattr(wishes, name) for name in ("prompt_tokens", "tokens", "temperature")},
            "known_prompts": self.known_prompts,
            "replay": self.replay or None,
            "limit": {"enforced": not self.unenforced, "why_not": self.unenforced or None},
            "page_cache_dropped": self.drops_caches,
            "same_tokens": self.same_tokens,
            "runs": [{**score.to_dict(), **({"replay": True} if self.replay else {})} for score in self.scores],
        }


def bench(
    stored: StoredModel, wishes: Wishes, *, progress: Progress = NO_PROGRESS, notify: Notify = lambda _: None
) -> Report:
    """Measure. `notify` gets sentences about what is not as a reader would expect.

    Raises what loading the model raises, UnsupportedError for rivals that cannot read it, UsageError for a trace that
    does not fit or a context that is too short, and CapacityError when there is no room for the rivals' files. A rival
    that fails is a score with an `error`.
    """
    _check_rivals(stored, wishes)
    trace = _read_replay(stored, wishes)
    with stored.use(), ExitStack() as stack:
        drops_caches = _drop_caches()
        groups = [_Group(stored, wishes, experts, trace, notify) for experts in _distinct(wishes)]
        unenforced = _NO_LIMIT if groups[0].survey.device else _why_no_limit()
        known = 0 if trace else _count_known(stored, wishes)
        for sentence in _shortcomings(stored, wishes, known, unenforced, drops_caches):
            notify(sentence)
        files = _Files(stored, wishes, stack, progress)
        total = sum(len(group.scores()) for group in groups) * wishes.repeat
        scores: list[Score] = []
        with progress.task(f"bench {stored.name}", total, "runs") as task:
            for group in groups:
                scores += group.measure(files, is_limited=not unenforced, advance=task.advance)
    return Report(
        model=stored.name,
        wishes=wishes,
        machine=_machine(stored),
        random=groups[0].survey.random,
        quantization=groups[0].survey.quantization,
        quality=groups[0].survey.quality,
        replay=_describe(trace, stored, wishes) if trace else {},
        prompts=groups[0].prompts,
        known_prompts=known,
        unenforced=unenforced,
        drops_caches=drops_caches,
        same_tokens=mark_same_tokens(scores),
        scores=scores,
    )


class _Group:
    """The runs that have one budget: moeinf in its settings, and the rivals."""

    def __init__(
        self, stored: StoredModel, wishes: Wishes, experts: str | None, trace: Trace | None, notify: Notify
    ) -> None:
        self._stored = stored
        self._wishes = wishes
        self._experts = experts
        self._engines = [engine for engine in wishes.engines if engine.experts == experts]
        first = self._engines[0]
        slots = _slots(experts, stored, trace)
        self.survey = _survey(stored.name, replace(first, experts=slots), wishes)
        for note in self.survey.notes:
            notify(note)
        if self.survey.device and (unable := [name for name in wishes.rivals if name in ("mmap", "llama.cpp")]):
            raise UsageError(
                f"{unable[0]} is measured on the processor, and this on {self.survey.device}",
                hint=f"leave {unable[0]} out of --against, or give --device cpu",
            )
        asked = first.device_memory if self.survey.device else first.host_memory
        is_fixed = asked is None and experts is not None
        self.budget = self.survey.total if is_fixed else self.survey.budget
        self.limit = self.survey.libraries + self.budget
        if self.survey.thrashes:
            notify(f"{self.survey.slots} experts fit and one token asks for {self.survey.token_experts}")
        make = _recorded if trace else _written
        self._requests = make(wishes, self.survey, trace, notify)

    @property
    def prompts(self) -> int:
        """How many are measured."""
        return len(self._requests[0])

    def scores(self) -> list[tuple[Score, EngineOptions | None]]:
        """What is to be measured, in the order of a round."""
        found: list[tuple[Score, EngineOptions | None]] = []
        for start in self._wishes.starts:
            for engine in self._engines:
                found.append((self._score("moeinf", start, engine.policy, engine.prefetch), engine))
            found += [(self._score(rival, start), None) for rival in self._wishes.rivals]
        return found

    def measure(self, files: _Files, *, is_limited: bool, advance: Callable[[int], None]) -> list[Score]:
        """Run everything once, then everything again; what has failed is not tried again."""
        pairs = self.scores()
        for _ in range(self._wishes.repeat):
            for score, engine in pairs:
                if not score.error:
                    self._run(score, self._job(score, engine, files), is_limited)
                advance(1)
        return [score for score, _ in pairs]

    def _run(self, score: Score, job: Job, is_limited: bool) -> None:
        threads, with_disk = job.threads, self.survey.regime == "streaming"
        is_ours = score.system == "moeinf"
        has_rates = is_ours and not self.survey.device  # those of the host bound nothing there
        before = measure_rates(self._stored, threads, with_disk=with_disk) if has_rates else None
        _drop_caches()
        try:
            answer = _work({"job": job.to_json()}, self.limit if is_limited else None)
        except MoeinfError as error:
            if is_ours and not isinstance(error, _EndedError):
                raise
            score.error = str(error)
            return
        run, rates = Run.from_dict(answer), Rates()
        if before is not None:
            rates = before.between(measure_rates(self._stored, threads, with_disk=with_disk))
        belady = None
        if run.counts is not None:
            belady = belady_hit_rate(read_trace(Path(job.routing)), len(job.warm_up), run.counts)
        score.runs.append(Measured(run, rates, belady))

    def _score(self, system: str, start: str, policy: str | None = None, prefetch: str | None = None) -> Score:
        several = {name for name in ("policy", "prefetch") if len({getattr(e, name) for e in self._engines}) > 1}
        words = [system, *(value for name, value in (("policy", policy), ("prefetch", prefetch)) if name in several)]
        words += [start] if len(self._wishes.starts) > 1 else []
        words += ["replay"] if self._wishes.trace else []
        label = ", ".join(word for word in words if word)
        size = self._stored.manifest.layout.nbytes
        return Score(system, label, start, self._experts, policy, prefetch, self.budget, self.limit, size)

    def _job(self, score: Score, engine: EngineOptions | None, files: _Files) -> Job:
        measured, others = self._requests
        first = replace(others[0], prompt=others[0].prompt[:_FIRST_TOKENS], tokens=_FIRST_NEW_TOKENS)
        if first.sequence is not None:
            first = replace(others[0], tokens=_FIRST_NEW_TOKENS)
        options = engine or self._engines[0]
        manifest = self._stored.manifest
        bounded = "device_memory" if self.survey.device else "host_memory"
        plan = {bounded: str(self.budget), "context": self.survey.context}
        if self._experts is not None:
            plan["experts"] = str(self.survey.slots)
        return Job(
            score.system,
            self._stored.name,
            warm_up=[first] if score.start == "cold" else others,
            requests=measured,
            temperature=self._wishes.temperature,
            threads=options.threads,
            engine={**asdict(options), **plan} if engine else {},
            folder=files.of(score.system),
            scratch=str(files.scratch),
            resident_layers=_whole_layers(self._stored, self.survey.slots),
            modules=[layer.module for layer in manifest.layers],
            trace=str(self._wishes.trace or ""),
            device=self.survey.device,
            routing=str(files.routing) if engine else "",
        )


class _Files:
    """What the rivals read, written once, beside the models, and what a run of moeinf says of its routing; removed at
    the end.
    """

    def __init__(self, stored: StoredModel, wishes: Wishes, stack: ExitStack, progress: Progress) -> None:
        home = home_path() / "bench"
        self.scratch = home / stored.name
        self.routing = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moeinf-")), "routing.safetensors")
        self._gguf = wishes.gguf
        self._checkpoint = self.scratch
        if not wishes.rivals:
            return
        disk = FileSystem()
        with explained(home):
            stack.enter_context(exclusive_lock(home / f"{stored.name}.lock", "benchmarking"))
            disk.remove_tree(self.scratch)  # what a bench that was killed has left
            disk.make_folder(self.scratch)
        stack.callback(disk.remove_tree, self.scratch)
        if any(rival in _ON_DISK for rival in wishes.rivals):
            found = fused.find_fused(stored.manifest)
            if found is None:
                fused.write_fused(stored, self.scratch, progress)
            self._checkpoint = found or self.scratch

    def of(self, system: str) -> str:
        return str(self._gguf if system == "llama.cpp" else self._checkpoint)


class _EndedError(MoeinfError):
    """A process was ended from outside."""


def _work(asked: dict[str, Any], limit: int | None) -> Any:
    """What a worker answers, in a cgroup of its own if there is a `limit`. Raises what it raised, or `_EndedError`.

    What suits moeinf's libraries may not suit those of others, who get the environment as it is, but for what attention
    is computed by: the same for all, or the same tokens could not be expected.
    """
    environ = dict(os.environ)
    attend_alike(environ)
    if Job.from_json(asked["job"]).system == "moeinf":
        tune_libraries(environ)
    with memory_limit(limit) if limit is not None else contextlib.nullcontext() as group:
        done = run_in(group, [sys.executable, "-m", "moeinf.worker"], json.dumps(asked), environ)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        if done.returncode in (-9, 137):
            if limit is None:
                raise _EndedError("killed, as the system does when memory runs out")
            raise _EndedError(f"killed: it needs more memory than the limit of {format_bytes(limit)} allows")
        raise _EndedError(f"ended with {done.returncode}: {last}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"], hint=answer["hint"])
    return answer["answer"]


def _survey(name: str, options: EngineOptions, wishes: Wishes) -> Survey:
    job = Job("moeinf", name, engine=asdict(options))
    texts = list(wishes.texts[: 2 * wishes.prompts])
    return Survey(**_work({"job": job.to_json(), "texts": texts, "prompt_tokens": wishes.prompt_tokens}, None))


def _check_rivals(stored: StoredModel, wishes: Wishes) -> None:
    quantization = stored.manifest.layout.quantization
    if (
        quantization is not None
        and not quantization.is_lossless
        and (unable := [rival for rival in wishes.rivals if rival in _ON_DISK])
    ):
        raise UnsupportedError(
            f"{stored.name} has {quantization.text}, which {unable[0]} cannot read",
            hint="leave out --against, or measure the same model with plain experts",
        )


def _distinct(wishes: Wishes) -> list[str | None]:
    return list(dict.fromkeys(engine.experts for engine in wishes.engines))


def _whole_layers(stored: StoredModel, slots: int) -> int:
    """How many MoE layers' experts have room in so many slots."""
    count = 0
    for layer in stored.manifest.layers:
        slots -= layer.num_experts
        if slots < 0:
            break
        count += 1
    return count


# What is asked of the model


def _written(
    wishes: Wishes, survey: Survey, _trace: Trace | None, notify: Notify
) -> tuple[list[Request], list[Request]]:
    """(what is measured, what warms up), of text."""
    room = survey.context - wishes.tokens
    if room < 1:
        raise UsageError(
            f"a context of {survey.context} tokens has no room for {wishes.tokens} new ones",
            hint="give a larger --context, or fewer --tokens",
        )
    requests = [Request(prompt[:room], wishes.tokens) for prompt in survey.prompts if prompt]
    if not requests:
        raise UsageError("the data set has no prompt with tokens", hint="give another --dataset")
    if len(requests) < wishes.prompts:
        notify(f"there are {len(requests)} prompts, not {wishes.prompts}")
    measured, others = requests[: wishes.prompts], requests[wishes.prompts :]
    if "warm" in wishes.starts and len(others) < len(measured):
        who = "" if others else ": the same ones do that"
        notify(f"the data set has {len(others)} other prompts to warm up with{who}")
    return measured, others or measured


def _recorded(
    wishes: Wishes, survey: Survey, trace: Trace | None, notify: Notify
) -> tuple[list[Request], list[Request]]:
    """(what is measured, what warms up), of a trace: tokens of no meaning, as many as were recorded."""
    assert trace is not None
    requests, longest = [], 0
    for number, sequence in enumerate(trace.sequences()):
        prompt = max(1, int(sequence.is_prefill.sum()))
        longest = max(longest, sequence.num_tokens - prompt + 1)
        kept = min(prompt, wishes.prompt_tokens, survey.context - wishes.tokens)
        if kept >= 1 and sequence.num_tokens - prompt + 1 >= wishes.tokens:
            ids = [(7919 * (number + place)) % survey.vocabulary for place in range(kept)]
            requests.append(Request(ids, wishes.tokens, number, prompt - kept))
    if not requests:
        raise UsageError(
            f"no request of {wishes.trace} has {wishes.tokens} tokens behind its prompt, within a context of"
            f" {survey.context}: {longest} is the most",
            hint="give fewer --tokens, or a larger --context",
        )
    if len(requests) < wishes.prompts:
        notify(f"the trace has {len(requests)} requests of {wishes.tokens} tokens, not {wishes.prompts}")
    measured, others = requests[: wishes.prompts], requests[wishes.prompts : 2 * wishes.prompts]
    if not others and "warm" in wishes.starts:
        raise UsageError(
            f"{wishes.trace} has no requests left to warm up with", hint="give fewer --prompts, or leave out --warm"
        )
    return measured, others or measured


def _count_known(stored: StoredModel, wishes: Wishes) -> int:
    """Prompts to be measured that the model's collection was traced with."""
    try:
        known = read_collection(_collection_path(stored), ModelIdentity.of(stored.name, stored.manifest)).texts
    except MoeinfError:  # what cannot be used is not used
        return 0
    return sum(text_digest(text) in known for text in wishes.texts[: wishes.prompts])


def _collection_path(stored: StoredModel) -> Path:
    return stored.path / TRACES_FOLDER / COLLECTION_FILE


def _read_replay(stored: StoredModel, wishes: Wishes) -> Trace | None:
    if wishes.trace is None:
        return None
    if "llama.cpp" in wishes.rivals:
        raise UsageError("llama.cpp cannot replay routing", hint="leave it out of --against, or leave out --replay")
    trace = read_trace(wishes.trace)
    if trace.foreseen is None and any(engine.prefetch == "gate" for engine in wishes.engines):
        raise UsageError(
            f"{wishes.trace} does not have what routers foresee, which --prefetch gate asks for",
            hint="moeinf trace records it; without it choose from off, eam and auto, which is both",
        )
    check_replay(trace, stored.manifest)
    return trace


def _slots(experts: str | None, stored: StoredModel, trace: Trace | None) -> str | None:
    """`experts` as typed; in a replay a share is one of the experts that the trace can name."""
    if experts is None or trace is None:
        return experts
    fewest = max(layer.top_k for layer in stored.manifest.layers)
    return str(parse_slots(experts, _replayed_experts(trace, stored), fewest))


def _replayed_experts(trace: Trace, stored: StoredModel) -> int:
    """The experts that the trace can name, in all layers of the model."""
    return sum(trace.layer_sizes[layer] for layer in _followed(trace, stored))


def _followed(trace: Trace, stored: StoredModel) -> list[int]:
    """The layer of the trace that each layer of the model follows."""
    return [recorded_layer(layer, len(trace.layer_sizes)) for layer in range(len(stored.manifest.layers))]


def _describe(trace: Trace, stored: StoredModel, wishes: Wishes) -> dict[str, Any]:
    followed = _followed(trace, stored)
    return {
        "trace": str(wishes.trace),
        "model": trace.identity.model,
        "layers": len(followed),
        "of_layers": len(trace.layer_sizes),
        "follows": followed,
        "experts": [trace.layer_sizes[layer] for layer in followed],
        "top_k": [trace.identity.top_k[layer] for layer in followed],
        "shares_are_of": _replayed_experts(trace, stored),
    }


# The machine


def _why_no_limit() -> str:
    """Why no memory cgroup can be had here, or nothing."""
    try:
        with memory_limit(1 << 40):
            return ""
    except UnsupportedError as error:
        return str(error)


def _drop_caches() -> bool:
    """Let the kernel forget what files hold. Whether it did, which takes root."""
    try:
        os.sync()
        _DROP_CACHES.write_text("3", encoding="ascii")
    except OSError:
        return False
    return True


def _shortcomings(
    stored: StoredModel, wishes: Wishes, known: int, unenforced: str, drops_caches: bool
) -> Iterator[str]:
    if known:
        yield (
            f"{known} of the prompts were traced with this model: what moeinf learned helps it more than with new ones"
            f" (another --dataset has some; without {_collection_path(stored)} all are new)"
        )
    if unenforced:
        yield f"{unenforced}; moeinf keeps its budget, and nothing keeps the others to it"
    if not drops_caches:
        yield "the page cache cannot be dropped before a run (that takes root): files may be in memory already"
    place, size = hardware.read_ahead_file(stored.path), hardware.read_ahead_bytes(stored.path)
    if size not in (None, _MAPPED_READ_AHEAD) and {"mmap", "accelerate"} & set(wishes.rivals):
        yield (
            f"the disk reads {format_bytes(size)} ahead; mapped weights are read fastest at"
            f" {format_bytes(_MAPPED_READ_AHEAD)}: echo {_MAPPED_READ_AHEAD // KIB} > {place}"
        )


def _machine(stored: StoredModel) -> dict[str, Any]:
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": hardware.processor_name(),
        "cores": os.cpu_count(),
        "memory": memory.total_bytes(),
        "read_ahead": hardware.read_ahead_bytes(stored.path),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS},
    }


_VERSIONS = ("moeinf", "torch", "transformers", "accelerate", "llama-cpp-python")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
