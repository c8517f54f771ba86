"""Linear layers of the dense part whose weights stay packed without loss (lossless.py).

Of few tokens the library computes the products from what is packed (`dense`, after a trial); for others rows of the
weight are unpacked in turn, where the next ones will be, and torch multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moeinf.errors import IntegrityError
from moeinf.ledger import BAND_BYTES, WHOLE_BYTES
from moeinf.lossless import expand
from moeinf.manifest import PANEL_INPUTS, PANEL_ROWS

from .native import NativePool

__all__ = ["LosslessLinear"]


class LosslessLinear(nn.Linear):
    """What `pack_into` makes of a linear layer. It has no parameter `weight`: who asks for that gets a copy, unpacked.

    `panels` and `uppers` are its weight, packed; `pool` is what unpacks it, None being torch.
    """

    panels: nn.Parameter
    uppers: nn.Parameter
    pool: NativePool | None

    @classmethod
    def pack_into(cls, layer: nn.Linear, panels: torch.Tensor, uppers: torch.Tensor) -> None:
        """Make `layer`, whose weight is not loaded, one whose weight is what these are packed from. Raises
        IntegrityError if it has other sides.
        """
        rows, width = len(panels) * PANEL_ROWS, panels.shape[1] * PANEL_INPUTS
        if (layer.out_features, layer.in_features) != (rows, width):
            raise IntegrityError(
                f"a weight of {layer.out_features} x {layer.in_features} is stored as one of {rows} x {width}",
                hint="`moeinf verify MODEL` says what is damaged, and how to mend it",
            )
        del layer.weight
        layer.__class__ = cls
        assert isinstance(layer, cls), "it was just made one"
        layer.panels = nn.Parameter(panels, requires_grad=False)
        layer.uppers = nn.Parameter(uppers.view(torch.int32), requires_grad=False)
        layer.pool = None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # a parameter of other layers
        """[out_features, in_features], in memory of its own."""
        return expand(self.panels, self.uppers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is None or self.pool.handle is None:
            return F.linear(x, self.weight, self.bias)
        band = max(1, BAND_BYTES // (2 * self.in_features * PANEL_ROWS)) * PANEL_ROWS
        if 2 * self.in_features * self.out_features <= WHOLE_BYTES:
            return F.linear(x, self.pool.unpack(self.panels, self.uppers), self.bias)
        output = x.new_empty(*x.shape[:-1], self.out_features)
        for first in range(0, self.out_features, band):
            count = min(band, self.out_features - first)
            bias = None if self.bias is None else self.bias[first : first + count]
            weight = self.pool.unpack(self.panels, self.uppers, first, count)
            output[..., first : first + count] = F.linear(x, weight, bias)
        return output
