"""What past requests asked for, kept to tell what the present one will.

An Expert Activation Matrix (EAM; MoE-Infinity, arXiv 2401.14361) counts, per MoE layer and expert, the tokens of one
request that were routed there. A collection keeps some of them, no two alike if it can help it. Pure arithmetic: knows
nothing of files, of models that run, or of what its answers are used for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CAPACITY", "PHASES", "ActivationCollection", "RequestCounter"]

Counts = NDArray[np.int32]
Floats = NDArray[np.float32]

PHASES = 2
"""Tokens of the prompt, and tokens that were made, are counted apart."""
CAPACITY = 128
"""The paper found 120 enough for 290 kinds of task."""
_NEIGHBOURS = 8
_SHARPNESS = 20.0
"""A request weighs exp(20 · its likeness): one that is 0.05 less alike weighs a third."""
_GOOD_LIKENESS = 0.8
"""A request less like every past one is foreseen from itself."""
_LEAST_TOKENS = 8
"""Requests of fewer tokens say too little to be kept."""
_REFRESH_TOKENS = 8
"""How like a request is to past ones changes slowly: that is looked up when so many more tokens were counted."""


class ActivationCollection:
    """At most `capacity` activation matrices of past requests of one model.

    Args:
        sizes: experts per MoE layer.
        matrices: int32 [requests, PHASES, layers, most experts of a layer], to begin with.
    """

    def __init__(self, sizes: Sequence[int], matrices: Counts | None = None, *, capacity: int = CAPACITY) -> None:
        shape = (0, PHASES, len(sizes), max(sizes))
        self.matrices = np.zeros(shape, np.int32) if matrices is None else matrices[:capacity]
        """The requests, in no order; read them, and change them with `add` only."""
        self.fresh: set[int] = set()
        """Places in `matrices` of the requests that have joined, until somebody has saved them and clears it."""
        self.texts: set[str] = set()
        """Digests of texts that requests are known to have been about: those that `moeinf trace` has put."""
        assert self.matrices.shape[1:] == shape[1:]
        self._capacity = capacity
        totals = self.matrices.sum(axis=1, dtype=np.float32).swapaxes(0, 1)
        self._units = _unit_rows(totals)
        self._shares = _shares(totals)

    def __len__(self) -> int:
        return len(self.matrices)

    def add(self, matrix: Counts) -> None:
        """Keep the matrix [PHASES, layers, experts] of a request; in a full collection it replaces the one most like
        it.
        """
        total = matrix.sum(axis=0, dtype=np.float32)
        if len(self) < self._capacity:
            self.fresh.add(len(self))
            self.matrices = np.concatenate([self.matrices, matrix[None]])
            self._units = np.concatenate([self._units, _unit_rows(total)[:, None]], axis=1)
            self._shares = np.concatenate([self._shares, _shares(total)[:, None]], axis=1)
        else:
            place = int(self.likeness(total).argmax())
            self.fresh.add(place)
            self.matrices[place] = matrix
            self._units[:, place] = _unit_rows(total)
            self._shares[:, place] = _shares(total)

    def likeness(self, matrix: Floats) -> Floats:
        """How like each request [requests] is to `matrix` [layers, experts], which may be the beginning of one: the
        mean of the cosines between their rows, over the layers that have run for it. 1 is the same, 0 is nothing in
        common; the paper's distance is 1 - likeness.
        """
        cosines: Floats = (self._units @ _unit_rows(matrix)[:, :, None])[:, :, 0]
        likeness: Floats = cosines.sum(axis=0) / max(int(matrix.any(axis=1).sum()), 1)
        return likeness

    def expected_shares(self, matrix: Floats) -> Floats | None:
        """The shares of each layer's choices [layers, experts] that its experts had in the requests most like `matrix`
        [layers, experts]; None if no request is much like it.
        """
        likeness = self.likeness(matrix)
        if likeness.max(initial=0) < _GOOD_LIKENESS:
            return None
        near = np.argsort(-likeness, kind="stable")[:_NEIGHBOURS]
        weights = np.exp(_SHARPNESS * (likeness[near] - likeness[near[0]]))
        shares: Floats = np.einsum("n,lne->le", weights / weights.sum(), self._shares[:, near])
        return shares

    def popularity(self) -> Floats:
        """The mean share of each layer's choices [layers, experts] over all requests; 0 in an empty collection."""
        mean: Floats = self._shares.sum(axis=1) / max(len(self), 1)
        return mean


class RequestCounter:
    """Counts what the present request asks for, and has it join the collection at its end.

    Args:
        sizes: experts per MoE layer.
        collection: what it is compared with, and what it joins.
    """

    def __init__(self, sizes: Sequence[int], collection: ActivationCollection) -> None:
        self.collection = collection
        self.learns = True
        """Whether the present request will join."""
        self._sizes = sizes
        self._matrix = np.zeros((PHASES, len(sizes), max(sizes)), np.int32)
        self._made = [memoryview(row) for row in self._matrix[1]]
        """The rows of what is counted while decoding."""
        self._tokens = 0
        self._looked_up_at = -1
        self._expected: Floats | None = None

    def begin_request(self) -> None:
        """The request that was counted, if there was one, is over, and another begins."""
        if self.learns and self._tokens >= _LEAST_TOKENS:
            self.collection.add(self._matrix.copy())
        self._matrix[:] = 0
        self._tokens, self._looked_up_at = 0, -1

    def count(self, layer: int, experts: Sequence[int] | NDArray[np.integer], tokens: int, *, is_prefill: bool) -> None:
        """`layer` ran for `tokens` tokens and chose these experts (numbers within the layer; those past the last stand
        for "none") for all of them.
        """
        size = self._sizes[layer]
        if is_prefill:
            self._matrix[0, layer, :size] += np.bincount(experts, minlength=size)[:size].astype(np.int32)
        else:
            row = self._made[layer]
            for expert in experts:  # for so few, NumPy takes four times as long
                if expert < size:
                    row[expert] += 1
        if layer == 0:
            self._tokens += tokens

    def expected_shares(self, layer: int) -> Floats:
        """The shares of `layer`'s choices that its experts are expected to have [experts], by the requests most like
        this one, or by this one.
        """
        if self._looked_up_at < 0 or self._tokens - self._looked_up_at >= _REFRESH_TOKENS:
            self._expected = self.collection.expected_shares(self._matrix.sum(axis=0, dtype=np.float32))
            self._looked_up_at = self._tokens
        known = (
            self._matrix[:, layer].sum(axis=0, dtype=np.float32) if self._expected is None else self._expected[layer]
        )
        return _shares(known[: self._sizes[layer]])


def _unit_rows(matrix: Floats) -> Floats:
    """Rows of length 1; those without entries stay 0."""
    units: Floats = matrix / np.maximum(np.linalg.norm(matrix, axis=-1, keepdims=True), np.float32(1e-9))
    return units


def _shares(matrix: Floats) -> Floats:
    """Rows of sum 1; those without entries stay 0."""
    shares: Floats = matrix / np.maximum(matrix.sum(axis=-1, keepdims=True), np.float32(1e-9))
    return shares
