"""Weights whose rows each have a table of levels of their own, fitted to the row: the format, and the stored tensors.

Lloyd's algorithm (Lloyd 1982) in one dimension, for all rows at once: each value goes to the nearest level, and each
level becomes the mean of its values, starting from quantiles of the row. Such tables are those of SqueezeLLM (Kim et
al. 2023, arXiv 2306.07629, section 4.1) without its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.core.formats import scales
from harness.core.formats.format import WeightFormat
from harness.core.formats.levels import ranks
from harness.core.formats.packing import pack, packed_bytes
from harness.core.formats.params import Params
from harness.core.formats.qtensor import GroupedQTensor, Tuner
from harness.core.formats.scales import ScaleDtype

_ITERATIONS = 30
_MOST_ERROR = 0.01  # of levels that are rounded to the dtype in which they are stored, relative


@dataclass(frozen=True, kw_only=True)
class LearnedWeight(WeightFormat):
    """For each output row of a weight (N out, K in), 2^bits levels; there are no scales.

    levels        learned
    levels_dtype  how levels are stored
    """

    levels: Literal["learned"]
    bits: int = 4
    granularity: Literal["channel"] = "channel"
    levels_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is out of range; expected 2 to 8")

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def label(self) -> str:
        return f"learned{self.bits}"

    def params(self, groups: Tensor, whole: Tensor | None = None) -> Params:
        return self.stored_params(fit_levels(groups.flatten(1), 1 << self.bits))

    def stored_params(self, levels: Tensor) -> Params:
        """The parameters with the levels (N, 2^bits), ascending, rounded to the dtype in which they are stored.

        Raises: ValueError if its range is too narrow for them.
        """
        return Params(levels.new_ones(len(levels), 1), levels=self._stored(levels))

    def encode(self, values: Tensor, params: Params) -> Tensor:
        return ranks(values, _levels(params)).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return _levels(params).gather(1, codes.reshape(len(codes), -1).long()).view(codes.shape)

    def snap(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        snapped = self.decode(ranks(values, _levels(params)), params)
        return snapped if out is None else out.copy_(snapped)

    def by_row(self, params: Params, rows: Tensor) -> Params:
        return replace(super().by_row(params, rows), levels=_levels(params)[rows])

    def quantized(self, weight: Tensor, params: Params) -> LearnedQTensor:
        return self.coded(self.codes(weight, params), params)

    def coded(self, codes: Tensor, params: Params) -> LearnedQTensor:
        """The weight of codes (N, K) uint8 that a method has chosen."""
        return LearnedQTensor(codes, params, self)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        rows, columns = shape
        return 8 * packed_bytes(rows * columns, self.bits) + (rows << self.bits) * scales.BITS[self.levels_dtype]

    def at(self, bits: int) -> LearnedWeight:
        return replace(self, bits=bits)

    def _stored(self, levels: Tensor) -> Tensor:
        stored = levels.to(getattr(torch, self.levels_dtype)).to(levels.dtype)
        largest = levels.abs().max().clamp(min=torch.finfo(levels.dtype).tiny)  # squares of levels could be 0
        if not ((stored - levels) / largest).norm() <= _MOST_ERROR * (levels / largest).norm():
            raise ValueError(
                f"{self.where}.levels_dtype={self.levels_dtype} cannot hold the levels up to {float(largest):.3g}; "
                f"use {self.where}.levels_dtype=float32"
            )
        return stored


class LearnedQTensor(GroupedQTensor):
    """Packed codes (N, K) and the levels of each row.

    levels  (N, 2^bits) ascending, in the dtype of the format
    """

    fmt: LearnedWeight
    levels: Tensor

    def __init__(self, codes: Tensor, params: Params, fmt: LearnedWeight) -> None:
        """Store `codes` (N, K) uint8 that select from `params.levels` (N, 2^bits)."""
        super().__init__((codes.shape[0], codes.shape[1]), fmt)
        self.register_buffer("qweight", pack(codes, fmt.bits))
        self.register_buffer("levels", _levels(params).to(getattr(torch, fmt.levels_dtype)))

    def params(self) -> Params:
        levels = self.levels.float()
        return Params(levels.new_ones(len(levels), 1), levels=levels)

    def tuner(self) -> Tuner:
        """A tuner of `levels`; levels that pass one another are sorted again, and their codes with them."""

        def weight(values: dict[str, Tensor]) -> Tensor:
            return values["levels"].gather(1, self.codes.long())

        def accept(values: dict[str, Tensor]) -> None:
            ascending = values["levels"].to(self.levels.dtype).sort(1)
            codes = ascending.indices.argsort(1).gather(1, self.codes.long())
            self.register_buffer("qweight", pack(codes.to(torch.uint8), self.fmt.bits))
            self.register_buffer("levels", ascending.values)

        return Tuner({"levels": self.levels.float()}, weight, accept)


def fit_levels(rows: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Levels (R, count), ascending, near which the values of each of `rows` (R, n) lie, by Lloyd's algorithm.

    `weights` (n,) are those of the squared errors; None: all are 1.
    """
    shares = torch.ones_like(rows) if weights is None else weights.to(rows).expand_as(rows)
    places = (torch.arange(count, dtype=rows.dtype, device=rows.device) + 0.5) / count
    ascending = rows.sort(1).values
    levels = ascending[:, (places * rows.shape[1]).long()].contiguous()
    for _ in range(_ITERATIONS):
        codes = ranks(rows, levels).long()
        sums = torch.zeros_like(levels).scatter_add_(1, codes, rows * shares)
        counts = torch.zeros_like(levels).scatter_add_(1, codes, shares)
        means = torch.where(counts > 0, sums / torch.where(counts > 0, counts, 1), levels)
        if torch.equal(means, levels):
            break
        levels = means
    return levels


def _levels(params: Params) -> Tensor:
    assert params.levels is not None
    return params.levels
