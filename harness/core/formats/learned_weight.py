"""Weights whose rows each have a table of levels of their own, fitted to the row: the format, and the stored tensors.

Lloyd's algorithm (Lloyd 1982) in one dimension, for all rows at once: each value goes to the nearest level, and each
level becomes the mean of its values, starting from quantiles of the row. Such tables are those of SqueezeLLM (Kim et
al. 2023, arXiv 2306.07629, section 4.1) without its weights. With groups, the values of each group are first put on
the range from 0 to 2^bits - 1, as in any4 (Elhoushi and Johnson 2025, arXiv 2507.04610, section 3).
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
from harness.core.formats.scale_tuner import trainable, within_range
from harness.core.formats.scales import ScaleDtype

_ITERATIONS = 30
_CONSTANT = 1024  # steps from 0 to the value of a group whose values are equal
_MOST_ERROR = 0.01  # of levels that are rounded to the dtype in which they are stored, relative


@dataclass(frozen=True, kw_only=True)
class LearnedWeight(WeightFormat):
    """For each output row of a weight (N out, K in), 2^bits levels l; a value is l, or (l - z) s in a group.

    levels        learned
    granularity   channel: no scales; group: a scale s and a float zero point z for `group_size` inputs of a row
    levels_dtype  how levels are stored
    scale_dtype   how scales and zero points of groups are stored
    """

    levels: Literal["learned"]
    bits: int = 4
    granularity: Literal["channel", "group"] = "channel"
    levels_dtype: ScaleDtype = "float16"
    scale_dtype: ScaleDtype = "float16"

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
        return self.fitted(groups, None)

    def fitted(self, groups: Tensor, shares: Tensor | None) -> Params:
        """Parameters of groups (N, G, n), whose levels fit their values by squared errors in units of scales.

        `shares` (N, G, n) are the weights of these errors; None: all are 1.
        """
        ranges = self.ranges(groups)
        steps, weights = _steps(groups, ranges.spread()), None if shares is None else shares.flatten(1)
        return self.stored_params(fit_levels(steps.flatten(1), 1 << self.bits, weights), ranges)

    def ranges(self, groups: Tensor) -> Params:
        """Scale and zero point (N, G) of groups (N, G, n), which put each on the range from 0 to 2^bits - 1."""
        if self.granularity == "channel":
            return Params(groups.new_ones(len(groups), 1))
        low, high = groups.amin(-1), groups.amax(-1)
        scale = torch.where(high > low, (high - low) / ((1 << self.bits) - 1), low.abs() / _CONSTANT)
        scale = scales.store(scale, self.scale_dtype, self.where)
        steps = scale.clamp(min=torch.finfo(scale.dtype).tiny)
        return Params(scale, (-low / steps).to(getattr(torch, self.scale_dtype)).to(scale))

    def stored_params(self, levels: Tensor, ranges: Params | None = None) -> Params:
        """The parameters with the levels (N, 2^bits), ascending, rounded to the dtype in which they are stored.

        `ranges` are those of the groups; None: there are none.
        Raises: ValueError if its range is too narrow for them.
        """
        return replace(ranges or Params(levels.new_ones(len(levels), 1)), levels=self._stored(levels))

    def encode(self, values: Tensor, params: Params) -> Tensor:
        return ranks(_steps(values, params), _levels(params)).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        levels = _levels(params).gather(1, codes.reshape(len(codes), -1).long()).view(codes.shape)
        return levels if params.zero_point is None else (levels - params.zero_point) * params.scale

    def snap(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        snapped = self.decode(ranks(_steps(values, params), _levels(params)), params)
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
        bits = 8 * packed_bytes(rows * columns, self.bits) + (rows << self.bits) * scales.BITS[self.levels_dtype]
        if self.granularity == "channel":
            return bits
        return bits + 2 * rows * self.groups(shape)[1] * scales.BITS[self.scale_dtype]

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

    levels             (N, 2^bits) ascending, in the dtype of the format
    scale, zero_point  (N, G) in the dtype of scales; None without groups
    """

    fmt: LearnedWeight
    levels: Tensor
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, codes: Tensor, params: Params, fmt: LearnedWeight) -> None:
        """Store `codes` (N, K) uint8 that select from `params.levels` (N, 2^bits)."""
        super().__init__((codes.shape[0], codes.shape[1]), fmt)
        dtype = getattr(torch, fmt.scale_dtype)
        self.register_buffer("qweight", pack(codes, fmt.bits))
        self.register_buffer("levels", _levels(params).to(getattr(torch, fmt.levels_dtype)))
        self.register_buffer("scale", None if params.zero_point is None else params.scale.to(dtype))
        self.register_buffer("zero_point", None if params.zero_point is None else params.zero_point.to(dtype))

    def params(self) -> Params:
        levels = self.levels.float()
        if self.scale is None or self.zero_point is None:
            return Params(levels.new_ones(len(levels), 1), levels=levels)
        return Params(self.scale.float(), self.zero_point.float(), levels=levels)

    def tuner(self) -> Tuner:
        """A tuner of `levels`, and of the groups' parameters.

        Levels that pass one another are sorted again, and their codes with them.
        """
        stored = trainable(self, "levels", "scale", "zero_point")

        def weight(values: dict[str, Tensor]) -> Tensor:
            params = replace(self.params(), **values).spread()
            return self.fmt.from_groups(self.fmt.decode(self.fmt.to_groups(self.codes), params), self.shape)

        def accept(values: dict[str, Tensor]) -> None:
            for name, value in within_range(values, stored).items():
                self.register_buffer(name, value.to(stored[name].dtype))
            ascending = self.levels.sort(1)
            codes = ascending.indices.argsort(1).gather(1, self.codes.long())
            self.register_buffer("qweight", pack(codes.to(torch.uint8), self.fmt.bits))
            self.register_buffer("levels", ascending.values)

        return Tuner({name: value.float() for name, value in stored.items()}, weight, accept)


def fit_levels(rows: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Levels (R, count), ascending, near which the values of each of `rows` (R, n) lie, by Lloyd's algorithm.

    `weights` (n,), or (R, n), are those of the squared errors; None: all are 1.
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


def _steps(values: Tensor, params: Params) -> Tensor:
    """The values in units of their scale, from their zero point; unchanged without one."""
    if params.zero_point is None:
        return values
    return torch.addcmul(params.zero_point, values, params.scale.clamp(min=torch.finfo(values.dtype).tiny).reciprocal())


def _levels(params: Params) -> Tensor:
    assert params.levels is not None
    return params.levels
