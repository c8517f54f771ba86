"""In which order torch adds up a product, found by trying.

With AMX oneDNN cuts the inputs of many rows, and many inputs of one row, by an estimate of its own, which depends on
all of a product's sizes (docs/experiments.md). The library can add up in any of those orders, so torch is asked for one
product of each size, of rows that show its order, and the library computes all that follow. Knows nothing of experts.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["IN_TURN", "KNOWN", "MOST_BYTES", "MOST_ROWS", "OWN", "STEP", "Known", "Order", "Orders", "step_of"]

STEP = 32
"""Inputs that one instruction adds up, at most."""
_ALL = 1 << 62
MOST_BYTES = 8 << 20
"""Products of many rows with larger matrices take so long that what torch takes before them does not count
(docs/experiments.md)."""
_MOST_SHARES = 8
_MOST_FAILURES = 3
"""After so many sizes whose order is none of those tried, other numbers of rows of such a matrix are left to torch."""


class Order(NamedTuple):
    """`moe_order` of csrc/moe.h: the inputs of a chain, of a share, and of a step."""

    chain: int
    share: int
    step: int = STEP


OWN = Order(0, 0)
"""The library's own."""
IN_TURN = Order(-1, 0)
"""That of weights [in, out] where oneDNN does not multiply: four chains take inputs in turn (MOE_IN_TURN)."""

MOST_ROWS = 64
"""As many rows of a linear layer are multiplied sooner than by oneDNN (docs/experiments.md)."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of torch's order where it is that of one of the library's sets of instructions.

    `rows`: of more of them nothing is. `least_inputs`: nor of fewer. `alike_inputs`: up to so many, an output does not
    depend on how many rows there are, if its steps do not. `columns`: the order of weights [in, out], None if the
    library has no such product of plain ones. `linear_rows`: as many rows of a linear layer are multiplied sooner than
    by torch.
    """

    rows: int = sys.maxsize
    least_inputs: int = 1
    alike_inputs: int = sys.maxsize
    columns: Order | None = OWN
    linear_rows: int = MOST_ROWS

    def adds_rows_alike(self, inputs: int) -> bool:
        """Whether an output of so many inputs is the same whatever else is computed with it."""
        return inputs <= self.alike_inputs and (self.knows_any_rows or step_of(inputs) == STEP)

    @property
    def knows_any_rows(self) -> bool:
        return self.rows == sys.maxsize


KNOWN = {
    "avx2": Known(columns=IN_TURN, linear_rows=sys.maxsize),
    "avx512bf16": Known(alike_inputs=1024),
    "avx512amx": Known(rows=32, least_inputs=64, alike_inputs=448, columns=None, linear_rows=32),
}
"""By the names of these sets (docs/experiments.md). Whether the order is torch's on a machine is tried."""

Kind = tuple[int, int, bool]
"""Of a matrix: its outputs, its inputs, and whether it lies [in, out]."""


class Orders:
    """Those found so far by `find(weight, rows, among)`, which says which of some orders is torch's for so many rows
    and `weight` [out, in], if any.
    """

    def __init__(self, find: Callable[[torch.Tensor, int, Iterable[Order]], Order | None]) -> None:
        self._find = find
        self._known: dict[tuple[Kind, int, int], Order | None] = {}
        self._found: dict[tuple[int, bool], list[Order]] = defaultdict(lambda: [OWN])
        """By inputs, and whether of one row: the last one first."""
        self._failures: dict[Kind, int] = defaultdict(int)

    def find(self, rows: int, kind: Kind, weight: Callable[[], torch.Tensor]) -> Order | None:
        """The order of so many rows with a matrix of this kind in bfloat16, of which `weight` is one; None if it is not
        known, or not worth finding.
        """
        size = (kind, rows, torch.get_num_threads())
        if size not in self._known:
            self._known[size] = self._try(kind, rows, weight)
        return self._known[size]

    def _try(self, kind: Kind, rows: int, weight: Callable[[], torch.Tensor]) -> Order | None:
        outputs, inputs, _ = kind
        is_large = outputs * inputs * torch.bfloat16.itemsize > MOST_BYTES
        if rows > 1 and (is_large or self._failures[kind] >= _MOST_FAILURES):
            return None
        found = self._found[inputs, rows == 1]
        others = _chains(inputs) if rows == 1 else _orders(inputs, torch.get_num_threads())
        order = self._find(weight(), rows, [*found, *others])
        if order is None:
            self._failures[kind] += 1
        else:
            found[:] = [order, *(other for other in found if other != order)]
        return order


def step_of(inputs: int) -> int:
    """Those of each step of a product of several rows: of equal length, if that takes no more steps than whole ones."""
    steps = -(-inputs // STEP)
    return inputs // steps if inputs % (2 * steps) == 0 else STEP


def _chains(inputs: int) -> Iterator[Order]:
    """Those of one row that differ from the library's own, which has no chains: chains of equal length."""
    return (Order(chain, _ALL) for chain in range(2 * STEP, inputs - STEP, STEP))


def _orders(inputs: int, threads: int) -> Iterator[Order]:
    """Those of several rows: steps of full length, then chains, in one share, or as many for each of some threads."""
    if step_of(inputs) != STEP:
        yield Order(_ALL, _ALL)
    for order in _chains(inputs):
        chains = -(-inputs // order.chain)
        counts = range(2, min(threads, chains - 1, _MOST_SHARES) + 1)
        yield from (order, *(order._replace(share=-(-chains // count) * order.chain) for count in counts))
