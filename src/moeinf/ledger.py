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

__all__ = ["MemoryPlan", "ModelShape", "Regime", "make_plan"]

Regime = Literal["resident", "streaming"]

_PAGE = 4096
_MOST_RESERVE_BYTES = 1024 * MIB
"""Left free for everybody else when no budget is given: this, or a tenth of what is available if that is less."""
_WORKSPACE_BYTES = 96 * MIB
_DEFAULT_CONTEXT = 4096
_PREFILL_TOKENS = (1024, 512, 256, 128, 64, 32)
"""How many prompt tokens go through the model at once: the first of these whose workspace leaves room for the slots."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the workspace depends on, from the model's config. `score_heads` is 0 where attention never holds a whole
    score matrix.
    """

    hidden: int
    widest: int
    vocabulary: int
    score_heads: int
    dtype_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What goes where, in bytes; `slots` experts of `slot_bytes`; `prefill_tokens` of a prompt at once; `context`
    tokens at most.

    `token_experts` is what one token asks for: with fewer slots than that, an LRU cache finds nothing twice.
    """

    budget: int
    dense: int
    kv_cache: int
    workspace: int
    slots: int
    slot_bytes: int
    all_experts: int
    token_experts: int
    context: int
    prefill_tokens: int

    @property
    def experts(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def total(self) -> int:
        return self.dense + self.kv_cache + self.workspace + self.experts

    @property
    def regime(self) -> Regime:
        return "resident" if self.slots >= self.all_experts else "streaming"

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
    budget = available_bytes - min(_MOST_RESERVE_BYTES, available_bytes // 10)
    if host_memory is not None:
        budget = parse_size(host_memory, whole_bytes=available_bytes)
    slot_bytes = align_up(manifest.layout.nbytes, _PAGE)
    fewest_slots = max(layer.top_k for layer in manifest.layers)
    wanted_slots = _parse_slots(experts, manifest.num_experts, fewest_slots)
    dense = manifest.dense_bytes
    tokens = _context(manifest, context, budget)
    kv_cache = manifest.kv_fixed_bytes + tokens * manifest.kv_token_bytes

    needed = (wanted_slots or fewest_slots) * slot_bytes
    for prefill_tokens in _PREFILL_TOKENS:
        workspace = _workspace(manifest, shape, min(prefill_tokens, tokens), tokens)
        left = budget - dense - kv_cache - workspace
        # A long prompt in one piece reads each expert once, but slots serve every token: it gets a share at most.
        if left >= needed and (prefill_tokens == _PREFILL_TOKENS[-1] or workspace <= _WORKSPACE_BYTES + left // 8):
            break
    else:
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
        slots=wanted_slots or min(manifest.num_experts, left // slot_bytes),
        slot_bytes=slot_bytes,
        all_experts=manifest.num_experts,
        token_experts=manifest.token_experts,
        context=tokens,
        prefill_tokens=min(prefill_tokens, tokens),
    )


def _parse_slots(experts: str | None, num_experts: int, fewest: int) -> int | None:
    """Slots that `--experts` names: a number, or a share of all experts, never below the fewest that can work."""
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


def _workspace(manifest: Manifest, shape: ModelShape, tokens: int, context: int) -> int:
    """Bytes of activations for `tokens` at once: hidden states and the widest inner layer with their copies, the rows
    of the experts until they are added up, attention scores where they are held whole, logits of one token. The
    factors were measured (docs/experiments.md)."""
    top_k = max(layer.top_k for layer in manifest.layers)
    rows = tokens * (8 * shape.hidden + 4 * shape.widest + top_k * shape.hidden) * max(shape.dtype_bytes, 4)
    scores = shape.score_heads * tokens * context * 8
    logits = shape.vocabulary * 4 * 6
    return _WORKSPACE_BYTES + rows + scores + logits
