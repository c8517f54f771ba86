"""Traces: what the routers of a model chose, token by token.

A `Trace` is checked when it is made, wherever it comes from, so whoever has one need not check it again. Knows nothing
of files, of torch, of models that run, or of what traces are good for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import IntegrityError, UnsupportedError, UsageError
from .manifest import Manifest, Source

__all__ = [
    "MAX_ENTRIES",
    "MAX_EXPERTS",
    "MAX_LAYERS",
    "NO_EXPERT",
    "ModelIdentity",
    "Trace",
    "check_shapes",
    "concatenate",
]

NO_EXPERT = -1
"""Stands in `Trace.experts` where a token asks for fewer experts than there is room for."""

MAX_LAYERS = 1024
MAX_EXPERTS = (1 << 15) - 1
"""Experts of one layer, so that 16 bits hold their numbers and one more."""
MAX_ENTRIES = 1 << 31
"""tokens x layers x k of one trace: 4 GiB of expert numbers."""

_MAX_TEXT = 4096
_BLOCK_ENTRIES = 1 << 20

Array = npt.NDArray[Any]
N = TypeVar("N", bound=np.generic)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Whose routing a trace holds. Raises IntegrityError when the numbers make no sense.

    `model` is the name by which a person knows it; `architecture` and `source.repo` are empty and `source.commit` is
    None where they are not known. `layer_sizes` and `top_k` have one entry per MoE layer, in forward order: its
    experts, and how many of them a token asks for at most. `experts` says how they are quantised, if they are.
    """

    model: str
    architecture: str
    source: Source
    layer_sizes: tuple[int, ...]
    top_k: tuple[int, ...]
    experts: str = ""

    def __post_init__(self) -> None:
        for text in (self.model, self.architecture, self.source.repo, self.source.commit or "", self.experts):
            _require(len(text) <= _MAX_TEXT, f"a name of {len(text)} characters is none")
        layers = len(self.layer_sizes)
        _require(1 <= layers <= MAX_LAYERS, f"{layers} MoE layers are not between 1 and {MAX_LAYERS}")
        _require(len(self.top_k) == layers, f"there are {layers} layer sizes, and top_k for {len(self.top_k)} layers")
        for layer, (size, top_k) in enumerate(zip(self.layer_sizes, self.top_k, strict=True)):
            _require(1 <= size <= MAX_EXPERTS, f"layer {layer}: {size} experts are not between 1 and {MAX_EXPERTS}")
            _require(1 <= top_k <= size, f"layer {layer}: no token can ask for {top_k} of {size} experts")

    @classmethod
    def of(cls, name: str, manifest: Manifest) -> ModelIdentity:
        """The stored model of this name and manifest."""
        return cls(
            name,
            manifest.architecture,
            manifest.source,
            tuple(layer.num_experts for layer in manifest.layers),
            tuple(layer.top_k for layer in manifest.layers),
            manifest.layout.quantization.text if manifest.layout.quantization and not manifest.layout.is_exact else "",
        )

    @property
    def width(self) -> int:
        """The k of a trace's arrays: the largest of all layers."""
        return max(self.top_k)

    def shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a trace of so many tokens."""
        grid = (tokens, len(self.layer_sizes), self.width)
        row = (tokens,)
        rows = {"sequence_id": row, "position": row, "is_prefill": row}
        return {"experts": grid, "weights": grid, "foreseen": grid, **rows}

    def difference(self, other: ModelIdentity) -> str | None:
        """Why `other` is another model, in words; None if nothing says so.

        The name is a person's choice and does not count, nor does what one side does not know.
        """
        for what, mine, yours in (
            ("number of MoE layers", len(self.layer_sizes), len(other.layer_sizes)),
            ("number of experts per layer", self.layer_sizes, other.layer_sizes),
            ("number of experts per token", self.top_k, other.top_k),
            ("architecture", self.architecture, other.architecture),
            ("source", _repo(self.source), _repo(other.source)),
            ("commit", self.source.commit, other.source.commit),
        ):
            if mine and yours and mine != yours:
                return f"its {what} is {_said(yours)}, not {_said(mine)}"
        if self.source.repo and other.source.repo and self.experts != other.experts:
            return f"it has {other.experts or 'plain experts'}, not {self.experts or 'plain experts'}"
        return None


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What a model's routers chose, in the order in which its tokens ran.

        experts      int16   [tokens, layers, k]   numbered within their layer; NO_EXPERT where there is none
        weights      float16 [tokens, layers, k]   what the router weighted them with, 0 where there is none; or None
        sequence_id  int32   [tokens]              which request a token belongs to
        position     int32   [tokens]              its place in that request, from 0; only grows, and may skip
        is_prefill   bool    [tokens]              whether it was read as part of a prompt
        foreseen     int16   [tokens, layers, k]   what the layer's router named when it was asked one MoE layer early,
                                                   about the state expected there; NO_EXPERT where nobody asked; or None

    k is the largest `top_k` of all layers; a layer of a smaller one leaves the places behind its own empty. The arrays
    are read-only views of those given. Raises IntegrityError, which names the token and the layer, for anything that
    is not so, and UnsupportedError for more than MAX_ENTRIES.
    """

    identity: ModelIdentity
    experts: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float16] | None
    sequence_id: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    is_prefill: npt.NDArray[np.bool_]
    foreseen: npt.NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        dtypes = {"experts": np.int16, "sequence_id": np.int32, "position": np.int32, "is_prefill": np.bool_}
        if self.weights is not None:
            dtypes["weights"] = np.float16
        if self.foreseen is not None:
            dtypes["foreseen"] = np.int16
        for name, dtype in dtypes.items():
            values = getattr(self, name)
            _require(isinstance(values, np.ndarray), f"{name} is not an array")
            _require(values.dtype == dtype, f"{name} has dtype {values.dtype}, not {np.dtype(dtype)}")
        check_shapes(self.identity, {name: getattr(self, name).shape for name in dtypes})
        for name in dtypes:
            object.__setattr__(self, name, _read_only(getattr(self, name)))
        _check_order(self.sequence_id, self.position)
        for begin, end in _blocks(self.experts.shape):
            _check_experts(self.experts[begin:end], self.identity, begin)
            if self.weights is not None:
                _check_weights(self.weights[begin:end], self.experts[begin:end], begin)
            if self.foreseen is not None:
                _check_experts(self.foreseen[begin:end], self.identity, begin, "foreseen: ")

    @property
    def num_tokens(self) -> int:
        return len(self.experts)

    @property
    def layer_sizes(self) -> tuple[int, ...]:
        """Experts of each MoE layer."""
        return self.identity.layer_sizes

    def sequences(self) -> Iterator[Trace]:
        """The requests, each as a trace of its own, in the order of their first tokens."""
        order = np.argsort(self.sequence_id, kind="stable")
        starts = np.flatnonzero(np.diff(self.sequence_id[order])) + 1
        groups = [tokens for tokens in np.split(order, starts) if len(tokens)]
        for tokens in sorted(groups, key=lambda tokens: int(tokens[0])):
            yield self._take(tokens)

    def check_model(self, identity: ModelIdentity) -> None:
        """Raise UsageError if this is a trace of another model than `identity`."""
        difference = identity.difference(self.identity)
        if difference is not None:
            raise UsageError(
                f"this is a trace of another model than {identity.model}: {difference}",
                hint="use a trace that was recorded with this model",
            )

    def _take(self, tokens: npt.NDArray[np.intp]) -> Trace:
        weights = None if self.weights is None else self.weights[tokens]
        foreseen = None if self.foreseen is None else self.foreseen[tokens]
        rows = (self.sequence_id[tokens], self.position[tokens], self.is_prefill[tokens])
        return Trace(self.identity, self.experts[tokens], weights, *rows, foreseen)


def concatenate(traces: Sequence[Trace]) -> Trace:
    """One trace after the other. Sequences are numbered anew, so that those of different traces stay apart.

    Weights are kept if all traces that have tokens have them, and what was foreseen if any has it. Raises UsageError
    for no trace at all, and for traces of different models.
    """
    if not traces:
        raise UsageError("there is no trace to put together")
    for trace in traces[1:]:
        trace.check_model(traces[0].identity)
    parts = [trace for trace in traces if trace.num_tokens] or traces[:1]
    weights = [trace.weights for trace in parts if trace.weights is not None]
    return Trace(
        traces[0].identity,
        np.concatenate([trace.experts for trace in parts]),
        np.concatenate(weights) if len(weights) == len(parts) else None,
        np.concatenate(list(_renumbered(trace.sequence_id for trace in parts))),
        np.concatenate([trace.position for trace in parts]),
        np.concatenate([trace.is_prefill for trace in parts]),
        np.concatenate([_foreseen(trace) for trace in parts]) if any(t.foreseen is not None for t in parts) else None,
    )


def check_shapes(identity: ModelIdentity, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise IntegrityError if arrays of these shapes do not make a trace of that model, UnsupportedError if they make
    one of more than MAX_ENTRIES. `shapes` has those of `experts` at least.
    """
    _require(len(shapes["experts"]) == 3, f"experts has shape {list(shapes['experts'])}, not [tokens, layers, k]")
    tokens, layers, width = shapes["experts"]
    if tokens * layers * width > MAX_ENTRIES:
        raise UnsupportedError(
            f"{tokens} tokens, {layers} layers and {width} experts make more than {MAX_ENTRIES} numbers",
            hint="split it into several traces",
        )
    expected = identity.shapes(tokens)
    for name, shape in shapes.items():
        _require(shape == expected[name], f"{name} has shape {list(shape)}, not {list(expected[name])}")


def _foreseen(trace: Trace) -> npt.NDArray[np.int16]:
    return np.full_like(trace.experts, NO_EXPERT) if trace.foreseen is None else trace.foreseen


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise IntegrityError(otherwise)


def _read_only(values: npt.NDArray[N]) -> npt.NDArray[N]:
    view = values.view()
    view.flags.writeable = False
    return view


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of the tokens that are small enough to make copies of."""
    tokens, layers, width = shape
    rows = max(1, _BLOCK_ENTRIES // (layers * width))
    return ((begin, min(begin + rows, tokens)) for begin in range(0, tokens, rows))


def _check_order(sequence_id: npt.NDArray[np.int32], position: npt.NDArray[np.int32]) -> None:
    for name, values in (("sequence_id", sequence_id), ("position", position)):
        for token in np.flatnonzero(values < 0)[:1]:
            raise IntegrityError(f"token {token}: {name} is {values[token]}, below 0")
    order = np.argsort(sequence_id, kind="stable")
    is_same = np.diff(sequence_id[order]) == 0
    for place in np.flatnonzero(is_same & (np.diff(position[order]) <= 0))[:1]:
        before, token = position[order[place]], order[place + 1]
        raise IntegrityError(
            f"token {token}: position {position[token]} of sequence {sequence_id[token]} comes after position {before}"
        )


def _check_experts(experts: npt.NDArray[np.int16], identity: ModelIdentity, first_token: int, what: str = "") -> None:
    is_used = np.arange(identity.width) < np.array(identity.top_k)[:, None]
    ends = np.where(is_used, np.array(identity.layer_sizes)[:, None], 0)
    for token, layer, place in np.argwhere((experts < NO_EXPERT) | (experts >= ends))[:1]:
        where, expert = f"{what}token {first_token + token}, layer {layer}", experts[token, layer, place]
        if not is_used[layer, place]:
            raise IntegrityError(f"{where}: place {place} is not empty, although k is {identity.top_k[layer]} here")
        raise IntegrityError(f"{where}: there is no expert {expert} among {identity.layer_sizes[layer]}")
    ordered = np.sort(experts, axis=2)
    is_repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    for token, layer, place in np.argwhere(is_repeated)[:1]:
        expert = ordered[token, layer, place]
        raise IntegrityError(f"{what}token {first_token + token}, layer {layer}: expert {expert} is named twice")


def _check_weights(weights: npt.NDArray[np.float16], experts: npt.NDArray[np.int16], first_token: int) -> None:
    for token, layer, _ in np.argwhere(~np.isfinite(weights))[:1]:
        raise IntegrityError(f"token {first_token + token}, layer {layer}: a weight is not a finite float16")
    for token, layer, place in np.argwhere((experts < 0) & (weights != 0))[:1]:
        raise IntegrityError(f"token {first_token + token}, layer {layer}: place {place} has a weight and no expert")


def _renumbered(parts: Iterator[npt.NDArray[np.int32]]) -> Iterator[npt.NDArray[np.int32]]:
    """Sequence numbers from 0, in ascending order within a part, and never the same in two parts."""
    first = 0
    for sequence_id in parts:
        known, places = np.unique(sequence_id, return_inverse=True)
        yield (places + first).astype(np.int32)
        first += len(known)


def _repo(source: Source) -> str:
    return source.repo.partition("@")[0]


def _said(value: object) -> str:
    """`value` for a message; numbers that are the same for all layers are said once."""
    if isinstance(value, tuple):
        return f"{value[0]}" if len(set(value)) == 1 else f"{list(value)}"
    return f"{value}"
