"""Batches of token rows, drawn from the domains by weight; any batch can be made again from its step number.

Rows of a domain are laid out once: a row starts where a document starts when the row before it ended inside a short
document, so that turns of a chat stay whole. Each pass over a domain takes its rows in a new order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Batches", "load_tokens", "row_starts", "validation_rows"]

END_OF_TEXT = 0


def load_tokens(work: Path, split: str, names: tuple[str, ...]) -> dict[str, NDArray[np.uint16]]:
    """Token arrays of the domains that have a file for `split`."""
    paths = {name: work / "tokens" / f"{name}.{split}.npy" for name in names}
    return {name: np.load(path) for name, path in paths.items() if path.exists()}


def row_starts(tokens: NDArray[np.uint16], length: int) -> NDArray[np.int64]:
    """First positions of rows of `length` + 1 tokens that cover the tokens."""
    ends = np.flatnonzero(tokens == END_OF_TEXT)
    starts: list[int] = []
    position = 0
    while position + length + 1 <= len(tokens):
        starts.append(position)
        last = int(np.searchsorted(ends, position + length)) - 1  # the last document end inside the row
        is_short = last >= 0 and ends[last] + 1 > position + length // 2
        position = int(ends[last]) + 1 if is_short else position + length
    return np.array(starts, dtype=np.int64)


def validation_rows(tokens: NDArray[np.uint16], length: int, rows: int) -> Tensor:
    """At most `rows` rows, spread evenly over the tokens."""
    starts = row_starts(tokens, length)
    chosen = starts[np.linspace(0, len(starts) - 1, min(rows, len(starts))).astype(int)]
    return torch.from_numpy(np.stack([tokens[s : s + length + 1].astype(np.int64) for s in chosen]))


class Batches:
    """Draws rows; `drawn` (rows taken per domain) is all its state."""

    def __init__(self, tokens: dict[str, NDArray[np.uint16]], length: int, seed: int) -> None:
        self.tokens = tokens
        self.length = length
        self.seed = seed
        starts = {name: row_starts(array, length) for name, array in tokens.items()}
        self.starts = {name: array for name, array in starts.items() if len(array)}
        self.names = list(self.starts)
        self.drawn = dict.fromkeys(self.names, 0)
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}

    def batch(self, step: int, rows: int, weights: dict[str, float]) -> Tensor:
        """Rows [rows, length + 1] for a step, each domain within one row of its share."""
        shares = np.cumsum([weights[name] for name in self.names])
        points = (np.random.default_rng((self.seed, step)).random() + np.arange(rows)) / rows * shares[-1]
        domains = np.searchsorted(shares, points, side="right")
        return torch.from_numpy(np.stack([self._row(self.names[domain]) for domain in domains]))

    def _row(self, name: str) -> NDArray[np.int64]:
        starts = self.starts[name]
        lap, place = divmod(self.drawn[name], len(starts))
        self.drawn[name] += 1
        if self._orders.get(name, (-1,))[0] != lap:
            generator = np.random.default_rng((self.seed, lap, *name.encode()))
            self._orders[name] = (lap, generator.permutation(len(starts)))
        start = starts[self._orders[name][1][place]]
        return self.tokens[name][start : start + self.length + 1].astype(np.int64)
