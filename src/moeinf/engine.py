"""A loaded model: the dense part in memory, the experts behind a cache, ready to generate.

`load` puts it together (the plan, the dense weights, the two hooks, the slots and their readers); `Engine` holds it
and takes it apart. Knows nothing of terminals, prompts or templates.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from . import hooks, memory
from .cache import ExpertCache
from .collection import ActivationCollection, RequestCounter
from .collectionfile import COLLECTION_FILE, CollectionFile
from .compiling import compile_layers, load_compiler
from .dense_reader import read_dense, take_packed
from .densefile import read_plain
from .device import Device, is_out_of_memory
from .embedding import EmbeddingTable, left_behind
from .errors import CapacityError, IntegrityError, MoeinfError, UnsupportedError, UsageError
from .gate import GatePredictor, first_decoder_layer
from .generation import Session
from .kernels import choose_device_maths, choose_maths, expands_for_a_token, speed_up_convolutions, speed_up_dense
from .kvcache import continues
from .latents import keep_expanded
from .ledger import MemoryPlan, can_cache_files
from .manifest import Manifest, expert_path
from .metamodel import model_shape
from .misses import HostMisses, MissChoice
from .native_reader import open_reader
from .placement import Placement, make_pool, place
from .policies import make_policy
from .policies.learned import NeighbourUsePolicy
from .policies.plain import LruPolicy
from .predictors import CombinedPredictor, EamPredictor, NoPredictor, Predictor
from .pull import resolve
from .qualityfile import QUALITY_FILE, Quality, read_quality
from .runlog import RunLog
from .runtime import ExpertRuntime
from .settings import DEFAULT_POLICY, EngineOptions, check_transformers, tune_libraries
from .stats import ByteStats, ExpertStats, MemoryStats, PrefetchStats, Stats
from .store import TRACES_FOLDER, Store, StoredModel
from .tiers import DevicePool, HostTier
from .trace import ModelIdentity
from .transfer import READERS, ExpertReader, Fetcher, Pool, SlotPool, can_read_direct
from .units import format_bytes

__all__ = ["Engine", "load", "load_tokenizer"]

_COMPILES = "torch compiles layers while the first answer is made, which takes a while"
_NOT_PINNED = (
    "the system does not let the GPU reach host memory by itself (ulimit -l may say why): experts are copied slower"
)


class Engine:
    """One model, loaded. Use it as a context manager, or `close` it: it holds memory, threads and the model's lock.

    `model` is the transformers model, to be called or to `.generate()` as usual; `tokenizer` is its tokenizer; `plan`
    says what memory goes where; `device` what computes, None being the processor; `manifest` what is in the store;
    `quality` what its quantised experts cost, if that was
    measured; `notes` what a person should know about how it was loaded, in sentences. While `learns` is true, what
    requests asked for, and took, is kept for later.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: MemoryPlan,
        model: PreTrainedModel,
        tokenizer: Any,
        generation_config: GenerationConfig,
        runtime: ExpertRuntime,
        *,
        device: Device | None,
        collection_file: CollectionFile,
        run_log: RunLog,
        quality: Quality | None,
        notes: tuple[str, ...],
        libraries_bytes: int,
        load_s: float,
        on_close: ExitStack,
    ) -> None:
        self.manifest = manifest
        self.plan = plan
        self.model = model
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.runtime = runtime
        self.device = device
        self._turn, self._is_answering = threading.RLock(), False
        self.notes = notes
        self.quality = quality
        self._collection_file = collection_file
        self._run_log = run_log
        untyped: Any = model
        self.last_logits_only = {"logits_to_keep": 1} if untyped._supports_logits_to_keep() else {}
        self.uses_dynamic_cache: bool = untyped._supports_default_dynamic_cache()
        self._libraries_bytes = libraries_bytes
        self._load_s = load_s
        self._on_close = on_close
        self._last = Stats()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def learns(self) -> bool:
        return self.runtime.counter.learns

    @learns.setter
    def learns(self, learns: bool) -> None:
        counter = self.runtime.counter
        if learns != counter.learns:
            counter.begin_request()
            counter.learns = learns

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        eos = self.generation_config.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos or [])

    @property
    def experts_modules(self) -> dict[str, torch.nn.Module]:
        """The model's experts modules by their names, one per MoE layer in forward order."""
        return {layer.module: self.model.get_submodule(layer.module) for layer in self.manifest.layers}

    @property
    def learned_requests(self) -> int:
        """Requests in the collection by which the next start will foresee experts."""
        return len(self.runtime.counter.collection)

    @cached_property
    def continues(self) -> bool:
        """Whether several tokens at once can go on from a KV cache; else they have to one by one."""
        with hooks.without_experts(self.experts_modules.values()):
            return continues(self.model, self.plan.context)

    def session(self) -> Session:
        """A new conversation, with a KV cache of its own."""
        return Session(self)

    def stats(self) -> Stats:
        """What the last generation cost; counts since then for a model that is called directly."""
        decode, prefill, traffic = self.runtime.decode, self.runtime.prefill, self.runtime.traffic
        host = self.plan.host
        return dataclasses.replace(
            self._last,
            load_s=self._load_s,
            stall_s=traffic.stall_s,
            experts=ExpertStats(
                slots=self.runtime.cache.num_usable,
                host_slots=host.slots if host else 0,
                fetched=traffic.arrived,
                fetched_from_host=traffic.unread if host else 0,
                computed_on_host=decode.passed_by,
                requests=decode.requests + prefill.requests,
                hits=decode.hits + prefill.hits,
                waits=decode.waits + prefill.waits,
                misses=decode.misses + prefill.misses,
                hit_rate=decode.hits / decode.requests if decode.requests else 0.0,
                decode_requests=decode.requests,
                decode_hits=decode.hits,
                prefetched=decode.prefetched + prefill.prefetched,
                prefetch_used=decode.prefetch_used + prefill.prefetch_used,
                evictions=decode.evictions + prefill.evictions,
            ),
            prefetch=self._prefetch_stats(),
            bytes=ByteStats(
                disk_to_host=traffic.disk_bytes,
                host_to_device=traffic.arrived * self.manifest.layout.nbytes if host else 0,
            ),
            memory=MemoryStats(
                budget=self.plan.budget,
                dense=self.plan.dense,
                kv_cache=self.plan.kv_cache,
                workspace=self.plan.workspace,
                experts=self.plan.experts,
                host_budget=host.budget if host else 0,
                host_experts=host.experts if host else 0,
                libraries=self._libraries_bytes,
                peak_rss=memory.peak_rss_bytes(),
                peak_device=self.device.peak_bytes() if self.device else 0,
            ),
            kernels=self.runtime.kernels,
            quantization=self.manifest.layout.quantization.text if self.manifest.layout.quantization else "",
            quality=self.quality,
        )

    def make_room(self) -> None:
        """The device has run out of memory in the middle of a step: give half of its slots up, for good.

        Raises CapacityError where that would leave too few.
        """
        slots, fewest = self.plan.slots // 2, max(layer.top_k for layer in self.manifest.layers)
        while self.device is not None and slots >= fewest:
            try:
                self.runtime.shrink(slots)
            except torch.OutOfMemoryError:  # what was given up, somebody else has taken
                slots //= 2
                continue
            self.plan = dataclasses.replace(self.plan, slots=slots)
            self.notes += (f"{self.device.name} ran out of memory: from now on it holds {slots:,} experts",)
            return
        raise CapacityError(
            f"memory ran out, and half of {self.plan.slots} experts, which take {format_bytes(self.plan.experts)},"
            " are fewer than one layer asks for",
            hint="give it a shorter --context, or end what else uses the GPU",
        )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While this is open an answer is made; another thread's waits. Raises UsageError where an answer is being made
        by this thread, and what `ExpertRuntime.require_open` raises.
        """
        self.runtime.require_open()
        with self._turn:
            if self._is_answering:
                raise UsageError("an answer asks for another one of its engine", hint="ask when it has ended")
            self._is_answering = True
            try:
                yield
            finally:
                self._is_answering = False

    def finished(self, timing: Stats) -> Stats:
        """An answer has ended, and took the times of `timing`: what it cost altogether."""
        self._last = timing
        if self.learns:
            self._run_log.add(self.plan, timing.tpot_s, self.runtime.decode, self.runtime.best_predictor)
        return self.stats()

    def save_collection(self) -> None:
        """Write what the requests so far asked for beside the model, for the next start, together with what other
        processes have written there. Ends the present request.

        Raises CapacityError or UsageError if that cannot be written, MoeinfError if another process is writing it for
        more than a second; the old file is then as it was.
        """
        counter = self.runtime.counter
        counter.begin_request()
        if counter.collection.fresh:
            counter.collection = self._collection_file.save(counter.collection)

    def close(self) -> None:
        """Save what was learned and what answers took if that is possible, end the readers, give the memory of experts
        and dense weights back, and give up the lock. The engine is of no use afterwards; closing twice is harmless.
        """
        with self._on_close:
            for save in (self.save_collection, self._run_log.save):
                with suppress(MoeinfError):
                    save()
            self.runtime.close()
            hooks.give_back(self.model)
            if self.device is not None:
                self.device.free()

    def _prefetch_stats(self) -> PrefetchStats:
        runtime = self.runtime
        counters, used = runtime.prefetch, runtime.decode.prefetch_used + runtime.prefill.prefetch_used
        used_bytes = min(used * self.manifest.layout.nbytes, counters.read_bytes)
        return PrefetchStats(
            predictor=self.runtime.predictor,
            recall=counters.right / counters.asked if counters.asked else 0.0,
            precision=counters.right / counters.named if counters.named else 0.0,
            read_bytes=counters.read_bytes,
            wasted_bytes=counters.read_bytes - used_bytes,
        )


def load(
    model: str | Path,
    *,
    device: str = "auto",
    device_memory: str | None = None,
    host_memory: str | None = None,
    experts: str | None = None,
    context: int | None = None,
    policy: str = DEFAULT_POLICY,
    prefetch: str = "auto",
    miss: str = "fetch",
    kernels: str = "auto",
    compile: str = "auto",  # noqa: A002  # as on the command line
    threads: int | None = None,
    dtype: str = "auto",
) -> Engine:
    """Load a stored model, or `demo`. The options are those of the command line (docs/cli.md), under the same names.
    `dtype` is what to compute in: the model's own (`auto`), or `float32`, where torch computes the experts and nothing
    is learned of requests.

    Raises ModelNotFoundError, IntegrityError, CapacityError (with the budget that would do), UsageError,
    UnsupportedError.
    """
    options = EngineOptions(
        device, device_memory, host_memory, experts, context, policy, prefetch, miss, kernels, compile, threads
    )
    with ExitStack() as stack, _default_dtype(torch.float32):
        store = Store()
        stored = resolve(str(model), store)
        stack.enter_context(store.hold(stored.name))
        try:
            engine = _load(stored, options, dtype, stack)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise CapacityError(
                "the GPU ran out of memory while the model was loaded: something else took what was free",
                hint="end what else uses it, or give --device-memory less than is free then",
            ) from error
        engine._on_close = stack.pop_all()
        engine.learns = not _is_wide(dtype, stored.manifest)
        return engine


def _load(stored: StoredModel, options: EngineOptions, dtype: str, stack: ExitStack) -> Engine:
    begin = time.perf_counter()
    check_transformers()
    tune_libraries()
    manifest, folder = stored.manifest, stored.path
    is_wide = _is_wide(dtype, manifest)
    if is_wide:
        options = dataclasses.replace(options, kernels=_wide_kernels(options.kernels))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with hooks.quiet():
        config = _load_part(AutoConfig, folder, "configuration")
        shape = model_shape(config, manifest)  # imports the family's code, before memory is counted
        tokenizer = load_tokenizer(stored)
    if options.compiles:
        load_compiler()
    placement = place(manifest, shape, options, is_wide=is_wide)
    libraries_bytes = memory.rss_bytes()  # what a GPU's take included
    reads_files = placement.device is None and can_cache_files(placement.plan, manifest, memory.available_bytes())
    direct = not reads_files and can_read_direct(folder / expert_path(0, 0))
    is_as_stored = placement.manifest.packed_dense == manifest.packed_dense
    on_disk = shape.table if placement.plan.looked_up else ""
    tensors = read_dense(folder, manifest, direct, on_disk) if is_as_stored else read_plain(folder, manifest, on_disk)
    table = stack.enter_context(EmbeddingTable(folder, manifest, on_disk)) if on_disk else None
    if table is not None:
        tensors[on_disk] = table.weight
    packed = take_packed(tensors, placement.manifest)
    model = hooks.load_dense_model(config, tensors, placement.dtype, packed)
    if table is not None:
        table.serve(model.get_input_embeddings())
    del tensors, packed
    modules = {layer.module: model.get_submodule(layer.module) for layer in manifest.layers}
    if placement.device is not None:
        on_host = copy.deepcopy(list(modules.values())) if options.computes_on_host else []
        with left_behind(model.get_input_embeddings()) if table is not None else nullcontext():
            hooks.move(model, placement.device.place)
    if (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = _load_part(GenerationConfig, folder, "generation config")
    generation_notes = _simplify(model.generation_config)
    identity = ModelIdentity.of(stored.name, manifest)
    traces = folder / TRACES_FOLDER
    collection_file = CollectionFile(traces / COLLECTION_FILE, identity)
    collection, notes = _read_collection(collection_file, identity)
    quality, more_notes = _read_quality(traces / QUALITY_FILE, manifest)
    counter = RequestCounter(identity.layer_sizes, collection)
    policy = make_policy(options.policy, identity.layer_sizes, collection)
    routing_memory = policy.memory if isinstance(policy, NeighbourUsePolicy) else None
    eam = EamPredictor(identity.layer_sizes, identity.top_k, counter, routing_memory)
    pool, fetcher, placement = _make_tiers(folder, manifest, placement, direct, stack)
    plan, misses = placement.plan, None
    if isinstance(pool, DevicePool):
        maths = choose_device_maths(modules.values(), manifest.layout, options.kernels, pool)
        if on_host:
            assert isinstance(fetcher, HostTier)
            misses = _make_misses(on_host, fetcher, manifest, options, stack)
    else:
        maths = choose_maths(modules.values(), manifest.layout, options.kernels, pool.tensors(0), stack)
        if not options.compiles:
            if options.kernels != "torch":
                speed_up_convolutions(model)
            hooks.attend(model, speed_up_dense(model, maths))
        keep_expanded(model, plan.expanded)
        if expands_for_a_token(model, maths, manifest.layout):
            plan = dataclasses.replace(plan, prompt_room=0)
        for layer_maths in maths:
            layer_maths.forget()
    runtime = ExpertRuntime(
        manifest,
        maths,
        cache=ExpertCache(manifest.num_experts, plan.most_slots, policy),
        pool=pool,
        fetcher=fetcher,
        counter=counter,
        predictors=_predictors(options.prefetch, plan.regime, eam, lambda: GatePredictor(model, modules)),
        misses=misses,
    )
    if options.prefetch in ("auto", "eam") and len(collection):
        runtime.warm_up(_most_popular(collection, identity.layer_sizes))
    hooks.attach(list(modules.values()), model, runtime, plan)
    if (first := first_decoder_layer(model, next(iter(modules)))) is not None:
        hooks.announce_tokens(first, runtime)
    if isinstance(pool, SlotPool) and not options.compiles:
        hooks.decode(model, modules, maths, runtime, pool)
    if options.compiles:
        compile_layers(model, list(modules.values()), model.device)
        notes = (*notes, _COMPILES)
    run_log = RunLog(
        traces, placement.manifest, placement.shape, plan, options, device=placement.device, reads_files=reads_files
    )
    runtime.begin_with(run_log.best_way())
    return Engine(
        manifest,
        plan,
        model,
        tokenizer,
        model.generation_config,
        runtime,
        device=placement.device,
        collection_file=collection_file,
        run_log=run_log,
        quality=quality,
        notes=(*placement.notes, *generation_notes, *notes, *more_notes),
        libraries_bytes=libraries_bytes,
        load_s=time.perf_counter() - begin,
        on_close=stack,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """While this is open, numbers that nobody gave a dtype have this one: trials count on that."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _simplify(config: GenerationConfig) -> tuple[str, ...]:
    """Leave out what a conversation cannot have, and say what changes its answers."""
    config.cache_implementation = None
    if (config.num_beams or 1) == 1:
        return ()
    config.num_beams, beams = 1, config.num_beams
    return (f"the model's generation config asks for {beams} beams, and answers are of one",)


def load_tokenizer(model: StoredModel) -> Any:
    """The model's tokenizer alone. Raises IntegrityError if its files are damaged."""
    with hooks.quiet():
        return _load_part(AutoTokenizer, model.path, "tokenizer")


def _is_wide(dtype: str, manifest: Manifest) -> bool:
    """Whether the model is to compute in a dtype that is not its own."""
    if dtype not in ("auto", "float32"):
        raise UsageError(f"--dtype {dtype} is not known", hint="choose one of: auto, float32")
    return dtype not in ("auto", manifest.dtype)


def _wide_kernels(kernels: str) -> str:
    if kernels not in ("auto", "torch"):
        raise UnsupportedError(
            f"--kernels {kernels} compute in the model's own dtype, and --dtype float32 asks for another",
            hint="leave --kernels out",
        )
    return "torch"


def _make_tiers(
    folder: Path, manifest: Manifest, placement: Placement, direct: bool, stack: ExitStack
) -> tuple[Pool, Fetcher, Placement]:
    """The slots that the maths reads, what brings experts there, and the placement as it has become."""
    on_device = make_pool(manifest, placement) if placement.device is not None else None
    host = placement.plan.host
    pool = SlotPool(manifest.layout, host.slots if host else placement.plan.most_slots)
    disk = ExpertReader(open_reader(threads=READERS, direct=direct), pool, *_expert_files(folder, manifest))
    stack.callback(disk.close)
    if on_device is None:
        return pool, disk, placement
    slots, placement = on_device
    assert placement.device is not None
    books = ExpertCache(manifest.num_experts, len(pool.bytes), LruPolicy(()))
    tier = HostTier(books, pool, disk, placement.device, slots)
    stack.callback(tier.close)
    if not tier.is_pinned:
        placement = dataclasses.replace(placement, notes=(*placement.notes, _NOT_PINNED))
    return slots, tier, placement


def _make_misses(
    modules: list[nn.Module], tier: HostTier, manifest: Manifest, options: EngineOptions, stack: ExitStack
) -> HostMisses:
    """What computes experts in host memory, by `modules` that are there, too. Nothing is in the slots yet."""
    kernels = "torch" if options.kernels == "torch" else "auto"
    maths = choose_maths(modules, manifest.layout, kernels, tier.pool.tensors(0), stack)
    return HostMisses(tier, maths, MissChoice() if options.miss == "auto" else None)


def _expert_files(folder: Path, manifest: Manifest) -> tuple[list[Path], tuple[int, int]]:
    """The file of every expert, numbered over all layers, and where its data lies in it."""
    sizes = (layer.num_experts for layer in manifest.layers)
    paths = [folder / expert_path(layer, expert) for layer, size in enumerate(sizes) for expert in range(size)]
    return paths, (manifest.layout.data_offset, manifest.layout.file_bytes)


def _predictors(mode: str, regime: str, eam: EamPredictor, make_gate: Callable[[], Predictor]) -> dict[str, Predictor]:
    """What `--prefetch MODE` asks. With a slot for every expert there is soon nothing left to fetch, and `auto` then
    asks nobody; else it tries the router, with the matrices where that cannot tell, and if that does not pay, these.
    """
    match mode:
        case "gate":
            return {"gate": make_gate()}
        case "eam":
            return {"eam": eam}
        case "auto" if regime != "resident":
            return {"off": NoPredictor(), "gate": CombinedPredictor(make_gate(), eam), "eam": eam}
    return {"off": NoPredictor()}


def _read_collection(file: CollectionFile, identity: ModelIdentity) -> tuple[ActivationCollection, tuple[str, ...]]:
    """What was learned about the model, and what to say about it: a file that cannot be used is as good as none."""
    try:
        return file.read(), ()
    except MoeinfError as error:
        return ActivationCollection(identity.layer_sizes), (f"{error}; what is learned now will replace it",)


def _read_quality(path: Path, manifest: Manifest) -> tuple[Quality | None, tuple[str, ...]]:
    """What was measured of the model, and what to say about a file that cannot be used."""
    try:
        return read_quality(path, manifest), ()
    except MoeinfError as error:
        return None, (str(error),)


def _most_popular(collection: ActivationCollection, sizes: Sequence[int]) -> list[int]:
    """All experts, numbered over all layers, those first that past requests used most."""
    shares = np.concatenate([row[:size] for row, size in zip(collection.popularity(), sizes, strict=True)])
    experts: list[int] = np.argsort(-shares, kind="stable").tolist()
    return experts


def _load_part(auto: Any, folder: Path, what: str) -> Any:
    """What one of transformers' Auto classes makes of `folder`; code that comes with a model is never run."""
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # they raise what their parsers raise
        raise IntegrityError(
            f"{folder} holds no {what} that transformers can read: {error}",
            hint="`moeinf verify MODEL` says what is damaged, and how to mend it",
        ) from error
