"""The memory ledger: everything the engine will hold, counted before anything is allocated. Pure arithmetic on bytes.

    budget  ≥  dense weights + KV cache for the context + workspace + expert slots

The budget leaves out what the process held before the model was loaded (Python, torch, transformers, the tokenizer).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import CapacityError, UsageError
from .manifest import Manifest
from .units import MIB, align_up, format_bytes, parse_size

__all__ = ["SPARE_WINDOW", "MemoryPlan", "ModelShape", "Regime", "can_cache_files", "make_plan", "parse_slots"]

Regime = Literal["resident", "streaming"]

_PAGE = 4096
_MOST_RESERVE_BYTES = 1024 * MIB
"""Left free for everybody else when no budget is given: this, or a twentieth of what is available if that is less."""
_WORKSPACE_BYTES = 128 * MIB
_DEFAULT_CONTEXT = 4096
SPARE_WINDOW = 16
"""What a layer keeps of a sliding window has room for a sixteenth more, so that it does not move for every token."""
_STEP_TOKENS = 64
"""The workspace has room for this many tokens at once, always."""
_PREFILL_TOKENS = (2048, 1024, 512, 256, 128)
"""A long prompt goes through the model in pieces of one of these, for which slots lend their memory: each piece
may have to read every expert, so a quarter of the pieces is a quarter of the time."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the workspace and the time of a token depend on, from the model's config. `score_heads` is 0 where attention
    never holds a whole score matrix. `layers` are all layers, MoE or not. Of the dense weights, `head_bytes` are the
    output layer's, and `lookup_bytes` those of an embedding table of which a token needs a row only.
    """

    hidden: int
    widest: int
    vocabulary: int
    score_heads: int
    layers: int
    head_bytes: int
    lookup_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What goes where, in bytes; `slots` experts of `slot_bytes`; `context` tokens at most.

    `workspace` serves steps of up to `step_tokens` tokens; each token more takes `token_workspace`, which slots lend.
    `token_experts` is what one token asks for: with fewer slots than that, an LRU cache finds nothing twice.
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

    @property
    def experts(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def total(self) -> int:
        return self.dense + self.kv_cache + self.workspace + self.experts

    @property
    def regime(self) -> Regime:
        return "resident" if self.slots >= self.all_experts else "streaming"

    def lent_slots(self, tokens: int) -> int:
        """Slots that have to lend their memory to a step of `tokens` tokens, past what the budget has to spare."""
        needed = max(0, tokens - self.step_tokens) * self.token_workspace - (self.budget - self.total)
        return -(-max(0, needed) // self.slot_bytes)

    def prefill_tokens(self, lendable_slots: int) -> int:
        """How many tokens of a prompt go through the model at once, when so many slots can be lent."""
        fitting = (tokens for tokens in _PREFILL_TOKENS if self.lent_slots(tokens) <= lendable_slots)
        return next(fitting, self.step_tokens)

    @property
    def thrashes(self) -> bool:
        """Whether the slots hold less than one token asks for, so that each expert is evicted before it comes back."""
        return self.slots < min(self.token_experts, self.all_experts)


def make_plan(
    manifest: Manifest,
    shape: ModelShape,
    *,
    available_bytes: int,
    host_memory: str | None = None,
    experts: str | None = None,
    context: int | None = None,
) -> MemoryPlan:
    """Divide the memory. `available_bytes`: what this process may take; sizes as typed by the user, None meaning
    "choose".

    Raises CapacityError when the model cannot run within the budget, with the budget that would do; UsageError for bad
    options.
    """
    budget = available_bytes - min(_MOST_RESERVE_BYTES, available_bytes // 20)
    if host_memory is not None:
        budget = parse_size(host_memory, whole_bytes=available_bytes)
    slot_bytes = align_up(manifest.layout.nbytes, _PAGE)
    fewest_slots = max(layer.top_k for layer in manifest.layers)
    wanted_slots = parse_slots(experts, manifest.num_experts, fewest_slots)
    dense = manifest.dense_bytes
    tokens = _context(manifest, context, budget)
    kv_cache = manifest.kv_fixed_bytes + tokens * manifest.kv_token_bytes

    token_workspace = _token_workspace(manifest, shape, tokens)
    workspace = _base_workspace(manifest, shape, tokens) + _STEP_TOKENS * token_workspace
    needed = (wanted_slots or fewest_slots) * slot_bytes
    left = budget - dense - kv_cache - workspace
    if left < needed:
        least = dense + kv_cache + workspace + needed
        raise CapacityError(
            f"the model needs {format_bytes(least)}: {format_bytes(dense)} of dense weights, {format_bytes(kv_cache)}"
            f" of KV cache, {format_bytes(workspace)} of workspace and {needed // slot_bytes} experts; the budget is"
            f" {format_bytes(max(budget, 0))}",
            hint=f"give it --host-memory {-(-least // MIB)}MiB or more, or a shorter --context than {tokens}"
            + (", or fewer --experts" if wanted_slots else ""),
        )
    return MemoryPlan(
        budget=budget,
        dense=dense,
        kv_cache=kv_cache,
        workspace=workspace,
        token_workspace=token_workspace,
        slots=wanted_slots or min(manifest.num_experts, left // slot_bytes),
        slot_bytes=slot_bytes,
        all_experts=manifest.num_experts,
        token_experts=manifest.token_experts,
        context=tokens,
    )


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
            if 0 < share <= 100:
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


def _context(manifest: Manifest, asked: int | None, budget: int) -> int:
    """The asked context, or one whose KV cache takes an eighth of the budget at most."""
    if asked is not None:
        if asked > manifest.max_context:
            raise UsageError(
                f"--context {asked} is more than the {manifest.max_context} tokens this model was made for",
                hint=f"give it --context {manifest.max_context} or less",
            )
        return asked
    tokens = min(manifest.max_context, _DEFAULT_CONTEXT)
    if manifest.kv_token_bytes:
        tokens = min(tokens, max(256, budget // 8 // manifest.kv_token_bytes))
    return min(tokens, manifest.max_context)


def _token_workspace(manifest: Manifest, shape: ModelShape, context: int) -> int:
    """Bytes of activations per token of a step: hidden states and the widest inner layer with their copies, the rows of
    the experts until they are added up, its row of the mask, attention scores where they are held whole. The factors
    were measured (docs/experiments.md).
    """
    top_k = max(layer.top_k for layer in manifest.layers)
    rows = (2 * top_k * shape.hidden + 20 * shape.hidden + 10 * shape.widest) * 4
    return rows + (shape.score_heads + 1) * context * 8


def _base_workspace(manifest: Manifest, shape: ModelShape, context: int) -> int:
    """Bytes that any step takes: programs of matrix products, one layer's KV cache repeated for heads that share it,
    the spare room of sliding windows, logits, and a weight of a quantised expert, expanded.
    """
    repeated = 8 * context * manifest.kv_token_bytes // len(manifest.layers)
    spare = manifest.kv_fixed_bytes // SPARE_WINDOW
    return _WORKSPACE_BYTES + repeated + spare + shape.vocabulary * 4 * 6 + manifest.layout.expanded_bytes
