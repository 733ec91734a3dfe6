"""Codes that select from a few levels, in any order and at any distance: value' = level[code] * scale.

A value is divided by the scale of its group, and its code is that of the nearest level; a tie goes to the lower level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.core.formats import scales, tables
from harness.core.formats.format import Format
from harness.core.formats.params import Params
from harness.core.formats.scales import ScaleDtype
from harness.core.formats.tables import Table

_SMALLEST = 1e-38  # divisor of a group of zeros


@dataclass(frozen=True, kw_only=True)
class LevelsFormat(Format):
    """A fixed table of levels, see `harness.core.formats.tables`; the largest value of a group is the largest level.

    table        nf4, fp4 or lloyd_max
    bits         bits of a code; nf4 and fp4 have 4
    scale_dtype  how scales are stored
    """

    table: Table
    bits: int = 4
    scale_dtype: ScaleDtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        tables.levels(self.table, self.bits)

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return self.table if self.table in ("nf4", "fp4") else f"{self.table}{self.bits}"

    @property
    def levels(self) -> Tensor:
        """The levels (2^bits,) float32, by code."""
        return tables.levels(self.table, self.bits)

    @property
    def shrinks(self) -> list[list[tuple[float, float]]]:
        return [[(share, share) for share in scales.SHRUNK]]

    def cover(self, low: Tensor, high: Tensor, whole: Tensor | None = None) -> Params:
        return Params(scales.store(self.exact_scale(low, high), self.scale_dtype, self.where))

    def exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale at which the largest magnitude of a range becomes the largest level, before it is stored."""
        return torch.maximum(high, -low) / float(self.levels.max())

    def encode(self, values: Tensor, params: Params) -> Tensor:
        return nearest(shares_of(values, params.scale), self.levels.to(values))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return chosen(self.levels.to(params.scale), codes).mul_(params.scale)

    def snap(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        ascending = tables.ascending(self.table, self.bits).to(values)
        snapped = chosen(ascending, ranks(shares_of(values, params.scale), ascending))
        return torch.mul(snapped, params.scale, out=snapped if out is None else out)


def shares_of(values: Tensor, scale: Tensor) -> Tensor:
    """The values in units of their scale, 0 where the scale is 0."""
    return values * scale.clamp(min=_SMALLEST).reciprocal()


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Code (uint8) of the nearest level for each of `values`; `levels` has at most 256 entries, in any order."""
    ascending, order = levels.sort(stable=True)
    return chosen(order.to(torch.uint8), ranks(values, ascending))


def ranks(values: Tensor, ascending: Tensor) -> Tensor:
    """Rank (int32) of the nearest of the `ascending` levels for each of `values`; a tie goes to the lower level.

    Levels are (n,) for all values, or (R, n) for values (R, ...) whose rows have levels of their own.
    """
    middles = (ascending[..., 1:] + ascending[..., :-1]) / 2
    rows = values.reshape(*ascending.shape[:-1], -1).contiguous()
    return torch.searchsorted(middles, rows, out_int32=True).view(values.shape)


def chosen(table: Tensor, codes: Tensor) -> Tensor:
    """Entries of a table (n,) in the shape of `codes`."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
