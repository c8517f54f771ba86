"""The memory ledger: everything the engine will hold, counted before anything is allocated. Pure arithmetic on bytes.

    budget  ≥  dense weights + KV cache for the context + workspace + expert slots

The budget leaves out what the process held before the model was loaded (Python, torch, transformers, the tokenizer).
With a GPU that is its memory, and another budget bounds host memory: expert slots, and what the process needs to load.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from .errors import CapacityError, UsageError
from .manifest import ExpertLayout, Manifest
from .settings import MANY_PROGRAMS
from .units import KIB, MIB, align_up, format_bytes, parse_size

__all__ = [
    "BAND_BYTES",
    "SPARE_WINDOW",
    "WHOLE_BYTES",
    "HostPlan",
    "Libraries",
    "MemoryPlan",
    "ModelShape",
    "Regime",
    "can_cache_files",
    "make_device_plan",
    "make_plan",
    "parse_slots",
    "slot_bytes",
]

Regime = Literal["resident", "host-cached", "streaming"]

_MOST_RESERVE_BYTES = 1024 * MIB
"""Left free for everybody else when no budget is given: this, or a twentieth of what is available if that is less."""
_LIBRARY_BYTES = 128 * MIB
"""What libraries take at most beside all that is counted one by one, and what they take of a GPU, where it was not
measured."""
_CODE_BYTES, _MORE_CODE_BYTES = 14 * MIB, 11 * MIB
"""Of it, code of libraries that nothing used before the model was loaded, and what belongs to it; and what there is
more of it where attention is of another kind than most, or torch computes the experts of prompts (docs/experiments.md).
"""
_PAGE_BYTES, _PINNED_PAGE_BYTES = 4 * KIB, 16
"""For each page that a GPU reaches by itself, its driver keeps so much more of host memory (NVIDIA
open-gpu-kernel-modules #1234).
"""
_COMPILER_BYTES = 96 * MIB
"""What torch's compiler takes while it compiles, and what it keeps of that (docs/experiments.md)."""
_PROGRAM_BYTES = 400 * KIB
"""A program of a matrix product, which is as large for small matrices as for large ones."""
_TILE_PROGRAM_BYTES, _TILE_WIDTH = 512 * KIB, 512
"""What it takes more where torch multiplies by tiles (AMX), at twice this width; narrower models have smaller ones
(docs/experiments.md).
"""
_ATTENTION_PROGRAMS = 128
"""So many more of that size are what attention keeps there for prompts of many lengths."""
_THREAD_BYTES = 512 * KIB
"""A thread's stack, its part of the heap, and what it keeps of programs."""
_HOLES_TOKENS, _MORE_HOLES_TOKENS = 64, 256
"""The activations of so many tokens, for the holes that they leave in the heap; and where they are torch's."""
_DEFAULT_CONTEXT = 4096
SPARE_WINDOW = 16
"""What a layer keeps of a sliding window has room for a sixteenth more, so that it does not move for every token."""
_WORKSPACE_SHARE = 8
"""A GPU has a workspace for the longest pieces of a prompt that take this part of its budget at most."""
WHOLE_BYTES, BAND_BYTES = 64 * MIB, 16 * MIB
"""For a long prompt a dense weight that is packed is unpacked as a whole up to the first, and so much at a time beyond:
such is the output layer. Of parts of a weight torch may add up products of many rows in another order."""
_PASSING_SLOTS = 32
"""Of host memory, for experts that a GPU keeps for good once it has them."""
_COPIES_KEPT, _COPIES_ANEW, _COPIES_ON_DEVICE = 3, 24, 4
"""So many times the bytes of one layer's keys and values, made of latents, does attention take: where they are kept;
where they are made anew for each token, and leave holes of every size in the heap; and on a GPU, by arithmetic."""
_TOUCHED_TOKENS = 128
"""The rows of one head lie together, and count by the page: so many tokens more, at most, than were written."""
_STEP_TOKENS = 64
"""The workspace has room for this many tokens at once, always."""
_PREFILL_TOKENS = (2048, 1024, 512, 256, 128)
"""A long prompt goes through the model in pieces of one of these, for which slots lend their memory: each piece
may have to read every expert, so a quarter of the pieces is a quarter of the time."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the workspace and the time of a token depend on, from the model's config. `score_heads` is 0 where attention
    never holds a whole score matrix. `sharing` heads have the same keys and values. `layers` are all layers, MoE or
    not. Of the dense weights, `head_bytes` are the output layer's, and `lookup_bytes` those of an embedding table of
    which a token needs a row only; `table` is its name if it can stay on disk for that, or "". Where the KV cache has
    latents, `expanded_bytes` are what one layer makes of a token's, its keys and values; they are kept, too, in
    `kept_layers`, and made anew for each token in others (latents.py). Where a model `has_plain_attention`, all layers
    attend to all tokens' keys and values by torch's kernel: no latents, windows, states or whole score matrices, which
    ask for other matrix products. Where its KV cache `grows_in_place`, the memory of tokens to come is set aside, and
    untouched until they do (kvcache.py).
    """

    hidden: int
    widest: int
    vocabulary: int
    score_heads: int
    sharing: int
    layers: int
    head_bytes: int
    lookup_bytes: int
    expanded_bytes: int = 0
    kept_layers: int = 0
    has_plain_attention: bool = True
    grows_in_place: bool = True
    table: str = ""

    @property
    def kept_bytes(self) -> int:
        """Bytes that are kept of a token beside its KV cache."""
        return self.kept_layers * self.expanded_bytes


@dataclass(frozen=True, slots=True)
class Libraries:
    """What the memory that libraries take depends on beside the model: so many `programs` of matrix products are kept
    at most, the native library `takes_tokens` one by one, and `takes_prompts`, or torch computes their experts, so many
    `threads` compute, torch `has_tiles` to multiply by, and it `compiles` layers.
    """

    programs: int = MANY_PROGRAMS
    takes_tokens: bool = False
    takes_prompts: bool = False
    threads: int = 1
    has_tiles: bool = False
    compiles: bool = False


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What host memory holds behind a GPU, in bytes: `slots` experts of `slot_bytes`, and a `workspace`. While the
    model is loaded, its dense weights pass through the same memory.
    """

    budget: int
    workspace: int
    slots: int
    slot_bytes: int

    @property
    def experts(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def total(self) -> int:
        return self.workspace + self.experts


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What goes where in the memory of what computes, in bytes; `slots` experts of `slot_bytes`; `context` tokens at
    most. `host` is what stands behind the memory of a GPU, None where the processor computes.

    `workspace` serves steps of up to `step_tokens` tokens; each token more takes `token_workspace`, which slots lend. A
    GPU's slots lend nothing. `token_experts` is what one token asks for: with fewer slots than that, an LRU cache finds
    nothing twice. `expanded` is the part of `kv_cache` for keys and values that were made of latents. Experts may have
    what is needed at times alone: `token_room` for each token of the conversation, until it comes, and `prompt_room`,
    the part of `workspace` that steps of several tokens take. 0: they may not. `looked_up` are bytes of dense weights
    beside `dense`: a table that stays on disk, where tokens find their rows.
    """

    budget: int
    dense: int
    kv_cache: int
    workspace: int
    token_workspace: int
    slots: int
    slot_bytes: int
    all_experts: int
    token_experts: int
    context: int
    step_tokens: int = _STEP_TOKENS
    host: HostPlan | None = None
    expanded: int = 0
    token_room: int = 0
    prompt_room: int = 0
    looked_up: int = 0
    libraries: Libraries = Libraries()

    @property
    def experts(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def most_slots(self) -> int:
        """Slots before the conversation begins, those included that have room which is needed at times alone."""
        room = self._room(1, 0)
        spare = self.budget - self.total if room else 0
        return min(self.all_experts, self.slots + (spare + room) // self.slot_bytes)

    @property
    def last_slots(self) -> int:
        """Slots that a token has when the context is full."""
        return self.slots_at(self.context)

    @property
    def total(self) -> int:
        return self.dense + self.kv_cache + self.workspace + self.experts

    @property
    def regime(self) -> Regime:
        if self.slots >= self.all_experts:
            return "resident"
        return "host-cached" if self.host and self.host.slots >= self.all_experts else "streaming"

    def lent_slots(self, tokens: int, held: int) -> int:
        """Of `most_slots`, those that have to lend their memory to a step of `tokens` tokens, behind which the KV cache
        holds `held`: past what the budget has to spare, and what is set aside and not needed yet.
        """
        if self.host is not None:
            return 0
        needed = max(0, tokens - self.step_tokens) * self.token_workspace
        needed += (self.most_slots - self.slots) * self.slot_bytes
        needed -= self.budget - self.total + self._room(tokens, held)
        return -(-max(0, needed) // self.slot_bytes)

    def slots_at(self, held: int, tokens: int = 1) -> int:
        """Slots that a step of so many tokens has, `step_tokens` at most, when the KV cache holds `held`."""
        return self.most_slots - self.lent_slots(tokens, held)

    def _room(self, tokens: int, held: int) -> int:
        """Bytes that are set aside, and not needed by a step of `tokens`, behind which the KV cache holds `held`."""
        unheld = max(0, self.context - held - _TOUCHED_TOKENS) * self.token_room
        return unheld + (self.prompt_room if tokens == 1 else 0)

    def prefill_tokens(self, lendable_slots: int, held: int) -> int:
        """How many tokens of a prompt go through the model at once, when so many slots can be lent, beside those that
        any prompt takes behind which the KV cache holds `held`, all of it.
        """
        if self.host is not None:
            return self.step_tokens
        most = self.lent_slots(self.step_tokens, held) + lendable_slots
        fitting = (tokens for tokens in _PREFILL_TOKENS if self.lent_slots(tokens, held) <= most)
        return next(fitting, self.step_tokens)

    def with_slots(self, slots: int) -> MemoryPlan:
        """The same with so many slots, in a budget for just them. Behind a GPU, host memory holds as much of all
        experts as its budget has room for, unless the GPU holds them.
        """
        host = self.host
        if host is not None and slots < self.all_experts:
            fitting = (host.budget - host.workspace) // host.slot_bytes
            host = dataclasses.replace(host, slots=min(self.all_experts, fitting))
        budget = self.total - self.experts + slots * self.slot_bytes
        return dataclasses.replace(self, slots=slots, budget=budget, host=host)

    def with_host_slots(self, slots: int) -> MemoryPlan:
        """The same with so many slots in host memory behind a GPU, in a budget for just them."""
        assert self.host is not None, "there is no GPU"
        budget = self.host.workspace + slots * self.host.slot_bytes
        return dataclasses.replace(self, host=dataclasses.replace(self.host, slots=slots, budget=budget))

    @property
    def thrashes(self) -> bool:
        """Whether the slots hold less than one token asks for, so that each expert is evicted before it comes back."""
        return self.thrashes_with(self.last_slots)

    def thrashes_with(self, slots: int) -> bool:
        """The same of so many slots."""
        return slots < min(self.token_experts, self.all_experts)


def make_plan(
    manifest: Manifest,
    shape: ModelShape,
    *,
    available_bytes: int,
    host_memory: str | None = None,
    experts: str | None = None,
    context: int | None = None,
    widening: int = 1,
    libraries: Libraries = Libraries(),
) -> MemoryPlan:
    """Divide the memory. `available_bytes`: what this process may take; sizes as typed by the user, None meaning
    "choose". Weights take `widening` times their bytes when they are computed with. A table of which a token needs a
    row stays on disk where that can be, unless there is room for it beside all experts.

    Raises CapacityError when the model cannot run within the budget, with the budget that would do; UsageError for bad
    options.
    """
    budget = _budget(host_memory, available_bytes)
    kv_token = widening * manifest.kv_token_bytes + shape.kept_bytes
    lends = experts is None
    unpacked = _unpacked_bytes(manifest) if libraries.takes_tokens and widening == 1 else 0

    def plan(looked_up: int, tokens: int) -> MemoryPlan:
        token_workspace = _token_workspace(manifest, shape, tokens)
        empty = MemoryPlan(
            budget=budget,
            dense=widening * manifest.dense_bytes - looked_up,
            looked_up=looked_up,
            kv_cache=widening * manifest.kv_fixed_bytes + tokens * kv_token,
            expanded=tokens * shape.kept_bytes,
            token_room=kv_token + _repeated_bytes(manifest, shape, widening) if lends and shape.grows_in_place else 0,
            prompt_room=unpacked + (_STEP_TOKENS - 1) * token_workspace if lends else 0,
            workspace=_library_bytes(manifest, shape, libraries)
            + _base_workspace(manifest, shape, tokens, widening, _COPIES_KEPT if shape.kept_layers else _COPIES_ANEW)
            + _STEP_TOKENS * token_workspace,
            token_workspace=token_workspace,
            slots=0,
            slot_bytes=slot_bytes(manifest.layout),
            all_experts=manifest.num_experts,
            token_experts=manifest.token_experts,
            context=tokens,
            libraries=libraries,
        )
        return dataclasses.replace(empty, slots=_slots(manifest, empty, experts, "--host-memory"))

    return _with_table(plan, manifest, shape, context, budget, widening)


def make_device_plan(
    manifest: Manifest,
    shape: ModelShape,
    *,
    device_bytes: int,
    host_bytes: int,
    device_memory: str | None = None,
    host_memory: str | None = None,
    experts: str | None = None,
    context: int | None = None,
    widening: int = 1,
    computes_on_host: bool = False,
) -> MemoryPlan:
    """Divide a GPU's memory, of which `device_bytes` are free, and host memory behind it, of which this process may
    take `host_bytes`. Weights take `widening` times their bytes when they are computed with, on the host too if
    `computes_on_host`. The rest is as for `make_plan`.

    Raises CapacityError, also for a budget above what is free, and UsageError.
    """
    budget = _budget(device_memory, device_bytes)
    _check_free(budget, device_bytes, "--device-memory", "of the GPU's memory")

    fewest = max(layer.top_k for layer in manifest.layers)

    def plan(looked_up: int, tokens: int) -> MemoryPlan:
        token_workspace = _token_workspace(manifest, shape, tokens)
        dense = widening * manifest.dense_bytes - looked_up
        kv_cache = widening * (manifest.kv_fixed_bytes + tokens * manifest.kv_token_bytes)
        wanted = parse_slots(experts, manifest.num_experts, fewest) or fewest
        left = budget - dense - kv_cache - wanted * slot_bytes(manifest.layout)
        base = _LIBRARY_BYTES + _base_workspace(manifest, shape, tokens, widening, _COPIES_ON_DEVICE)
        room = min(budget // _WORKSPACE_SHARE, left) - base
        step_tokens = next((most for most in _PREFILL_TOKENS if most * token_workspace <= room), _STEP_TOKENS)
        empty = MemoryPlan(
            budget=budget,
            dense=dense,
            looked_up=looked_up,
            kv_cache=kv_cache,
            workspace=base + step_tokens * token_workspace,
            token_workspace=token_workspace,
            slots=0,
            slot_bytes=slot_bytes(manifest.layout),
            all_experts=manifest.num_experts,
            token_experts=manifest.token_experts,
            context=tokens,
            step_tokens=step_tokens,
        )
        slots = _slots(manifest, empty, experts, "--device-memory")
        most = manifest.num_experts if slots < manifest.num_experts else _PASSING_SLOTS
        expanded = manifest.layout.expanded_bytes + _wide_bytes(manifest, widening)
        workspace = _LIBRARY_BYTES + (expanded if computes_on_host else 0)
        loaded = manifest.dense_bytes - looked_up
        host = _plan_host(manifest, loaded, host_memory, host_bytes, most, workspace)
        return dataclasses.replace(empty, slots=slots, host=host)

    return _with_table(plan, manifest, shape, context, budget, widening)


def _plan_host(
    manifest: Manifest, loaded: int, host_memory: str | None, host_bytes: int, most_slots: int, workspace: int
) -> HostPlan:
    """`loaded` are the dense weights that pass through."""
    budget = _budget(host_memory, host_bytes)
    _check_free(budget, host_bytes, "--host-memory", "of host memory, which a GPU's copies keep from being swapped out")
    size, fewest = slot_bytes(manifest.layout), max(layer.top_k for layer in manifest.layers)
    least = workspace + max(loaded, fewest * size)
    if budget < least:
        raise CapacityError(
            f"the model needs {format_bytes(least)} of host memory: {format_bytes(workspace)} of workspace, and"
            f" its dense weights while they are loaded, or {fewest} experts; the budget is"
            f" {format_bytes(max(budget, 0))}",
            hint=f"give it --host-memory {-(-least // MIB)}MiB or more",
        )
    most = max(fewest, min(most_slots, manifest.num_experts))
    fitting = (budget - workspace) * _PAGE_BYTES // (size * (_PAGE_BYTES + _PINNED_PAGE_BYTES))
    return HostPlan(budget, workspace, min(most, max(fewest, fitting)), size)


def _budget(asked: str | None, free_bytes: int) -> int:
    """What may be held: as asked for, or what is free less a reserve."""
    if asked is not None:
        return parse_size(asked, whole_bytes=free_bytes)
    return free_bytes - min(_MOST_RESERVE_BYTES, free_bytes // 20)


def _check_free(budget: int, free_bytes: int, option: str, what: str) -> None:
    if budget > free_bytes:
        raise CapacityError(
            f"{option} is {format_bytes(budget)}, and {format_bytes(free_bytes)} {what} are free",
            hint=f"give it {option} {free_bytes // MIB}MiB or less",
        )


def slot_bytes(layout: ExpertLayout) -> int:
    """Bytes of a slot: an expert's data in whole pages of this machine, since direct reads bring whole pages, and a
    slot's are given back by themselves.
    """
    return align_up(layout.nbytes, mmap.PAGESIZE)


def _slots(manifest: Manifest, empty: MemoryPlan, experts: str | None, option: str) -> int:
    """The slots for a plan that has none yet: as many as `experts` says, or as fit. Raises CapacityError with the
    budget that would do, by the name of its option.
    """
    fewest = max(layer.top_k for layer in manifest.layers)
    wanted = parse_slots(experts, manifest.num_experts, fewest)
    least = empty.total + (wanted or fewest) * empty.slot_bytes
    if least > empty.budget:
        shorter = f", or a shorter --context than {empty.context}" if least - empty.kv_cache < empty.budget else ""
        raise CapacityError(
            f"the model needs {format_bytes(least)}: {format_bytes(empty.dense)} of dense weights,"
            f" {format_bytes(empty.kv_cache)} of KV cache, {format_bytes(empty.workspace)} of workspace and"
            f" {wanted or fewest} experts; the budget is {format_bytes(max(empty.budget, 0))}",
            hint=f"give it {option} {-(-least // MIB)}MiB or more{shorter}"
            + (", or fewer --experts" if wanted else ""),
        )
    return wanted or min(manifest.num_experts, (empty.budget - empty.total) // empty.slot_bytes)


def can_cache_files(plan: MemoryPlan, manifest: Manifest, available_bytes: int) -> bool:
    """Whether memory is left for the system to keep the files of all experts in its page cache beside the slots."""
    return available_bytes >= plan.total + manifest.experts_bytes


def parse_slots(experts: str | None, num_experts: int, fewest: int) -> int | None:
    """Slots that `--experts` names, or None for None: a number, or a share of all experts, which is never below the
    fewest that can work.

    Raises UsageError for what is neither, CapacityError for a number below the fewest.
    """
    if experts is None:
        return None
    text = experts.strip()
    try:
        if text.endswith("%"):
            share = float(text[:-1])
            if share > 100:
                raise UsageError(f"--experts {text} is more than there are", hint="a share is 100% at most")
            if share > 0:
                return min(num_experts, max(fewest, round(num_experts * share / 100)))
        elif int(text) > num_experts:
            return num_experts
        elif int(text) >= fewest:
            return int(text)
        elif int(text) > 0:
            raise CapacityError(
                f"--experts {text} is below what one layer asks for at once", hint=f"give it --experts {fewest} or more"
            )
    except ValueError:
        pass
    raise UsageError(f"--experts {experts!r} is neither a number nor a share", hint="write it like 256 or 25%")


def _context(manifest: Manifest, shape: ModelShape, asked: int | None, budget: int) -> int:
    """The asked context, or one whose KV cache takes an eighth of the budget at most; but 256 tokens or the model's own
    most at least.
    """
    if asked is not None:
        if asked > manifest.max_context:
            raise UsageError(
                f"--context {asked} is more than the {manifest.max_context} tokens this model was made for",
                hint=f"give it --context {manifest.max_context} or less",
            )
        return asked
    tokens = min(manifest.max_context, _DEFAULT_CONTEXT)
    if token_bytes := manifest.kv_token_bytes + shape.kept_bytes:
        tokens = min(tokens, max(256, budget // 8 // token_bytes))
    return tokens


def _with_table(
    plan: Callable[[int, int], MemoryPlan],
    manifest: Manifest,
    shape: ModelShape,
    context: int | None,
    budget: int,
    widening: int,
) -> MemoryPlan:
    """The plan, of bytes that are looked up and tokens, with a table left on disk where one can be, unless all experts
    fit beside it.
    """
    looked_up = shape.lookup_bytes if shape.table and widening == 1 else 0
    made = _with_context(partial(plan, looked_up), manifest, shape, context, budget)
    if looked_up and made.regime == "resident":
        with suppress(CapacityError):
            whole = plan(0, made.context)
            return whole if whole.regime == "resident" else made
    return made


def _with_context(
    plan: Callable[[int], MemoryPlan], manifest: Manifest, shape: ModelShape, asked: int | None, budget: int
) -> MemoryPlan:
    """The plan for the asked context, or for one that is chosen: half as long while the budget is too small, so that
    what would do for the shortest does.
    """
    tokens, least = _context(manifest, shape, asked, budget), _context(manifest, shape, asked, 0)
    while tokens > least:
        with suppress(CapacityError):
            return plan(tokens)
        tokens = max(least, tokens // 2)
    return plan(tokens)


def _token_workspace(manifest: Manifest, shape: ModelShape, context: int) -> int:
    """Bytes of activations per token of a step: hidden states and the widest inner layer with their copies, the rows of
    the experts until they are added up, its row of the mask, attention scores where they are held whole. The factors
    were measured (docs/experiments.md).
    """
    return _row_bytes(manifest, shape) + (shape.score_heads + 1) * context * 8


def _row_bytes(manifest: Manifest, shape: ModelShape) -> int:
    """Bytes of activations per token of a step, but for what depends on the context."""
    top_k = max(layer.top_k for layer in manifest.layers)
    return (2 * top_k * shape.hidden + 20 * shape.hidden + 10 * shape.widest) * 4


def _library_bytes(manifest: Manifest, shape: ModelShape, libraries: Libraries) -> int:
    """Bytes of host memory that libraries take in any step: their code, programs of matrix products, threads, and holes
    in the heap.
    """
    is_usual = libraries.takes_prompts and shape.has_plain_attention
    code = _CODE_BYTES + (0 if is_usual else _MORE_CODE_BYTES)
    holes = (_HOLES_TOKENS if libraries.takes_prompts else _MORE_HOLES_TOKENS) * _row_bytes(manifest, shape)
    shared = min(_LIBRARY_BYTES, code + libraries.programs * _PROGRAM_BYTES + holes)
    width = min(1.0, max(0.0, shape.hidden / _TILE_WIDTH - 1)) if libraries.has_tiles else 0.0
    tiles = int(width * (libraries.programs + _ATTENTION_PROGRAMS) * _TILE_PROGRAM_BYTES)
    compiler = _COMPILER_BYTES if libraries.compiles else 0
    return shared + libraries.threads * _THREAD_BYTES + tiles + compiler


def _base_workspace(manifest: Manifest, shape: ModelShape, context: int, widening: int, copies: int) -> int:
    """Bytes that any step takes beside what libraries do: one layer's KV cache repeated for heads that share it, or so
    many `copies` of what a layer makes of it, the spare room of sliding windows, logits, and a weight unpacked, or any
    of an expert, widened.
    """
    repeated = context * (_repeated_bytes(manifest, shape, widening) + copies * shape.expanded_bytes)
    spare = manifest.kv_fixed_bytes // SPARE_WINDOW
    return repeated + spare + shape.vocabulary * 4 * 6 + _unpacked_bytes(manifest) + _wide_bytes(manifest, widening)


def _repeated_bytes(manifest: Manifest, shape: ModelShape, widening: int) -> int:
    """Bytes of a token's keys and values in one layer, once for each head."""
    return shape.sharing * widening * manifest.kv_token_bytes // len(manifest.layers)


def _unpacked_bytes(manifest: Manifest) -> int:
    """Bytes of the largest weight of a packed expert, expanded, or of as much of a dense one as is at a time."""
    dense = (2 * rows * width for rows, width in manifest.packed_dense.values())
    unpacked = (size if size <= WHOLE_BYTES else BAND_BYTES for size in dense)
    return max(manifest.layout.expanded_bytes, *unpacked, 0)


def _wide_bytes(manifest: Manifest, widening: int) -> int:
    """Bytes of the largest weight of an expert in a dtype that takes `widening` times as many as its own."""
    layout = manifest.layout
    largest = max(layout.expanded_bytes, *(tensor.nbytes for tensor in layout.unpacked.tensors))
    return widening * largest if widening > 1 else 0
