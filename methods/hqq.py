"""Half-quadratic quantization: move each group's zero point until the weight error is small in a sparse norm.

Paper: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml's blog), with the
    constants of the authors' code (mobiusml/hqq core/optimize.py). e stands for W - W' in |W - W'|_p^p; e and
    the zero point are solved for in turn (sub-problems 1 and 2), while the coupling beta between e and W - W' grows.
Differs: each group stops by itself once its mean |W - W'| no longer falls, and keeps its best, where the authors stop a
    whole layer: perplexity is lower, and rows do not depend on one another. What is stored is what is optimised, where
    theirs is float32. `round_zero` is theirs, at 4 bits alone: the start is a whole zero point, what is stored a float;
    at 3 bits it decides the result. A zero point that the scheme has as an integer cannot follow, as it moves by less
    than half a code, so there the same sub-problem is solved for the scale, from the range widened to hold 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.core import grid
from harness.core.method import Method
from harness.core.qtensor import QTensor, round_to_grid
from harness.core.ranges import above_zero, at_least
from harness.core.scheme import Scheme, WeightFormat
from harness.core.stats import Stats

Params = tuple[Tensor, Tensor]  # scale and zero point

_CACHED = 2**17  # values of a weight that are solved at once, and stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class HQQ(Method):
    """Data free.

    norm         p of |W - W'|_p^p
    beta         coupling at the start; errors under beta^(-1 / (2 - p)) count as no outliers
    beta_growth  factor of beta from one iteration to the next
    iterations   at most so many, for each group
    round_zero   start float zero points from whole ones, so that 0.0 is near a code
    """

    norm: float = 0.7
    beta: float = 10.0
    beta_growth: float = 1.01
    iterations: int = 20
    round_zero: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1:
            raise ValueError(f"norm={self.norm} is out of range; expected more than 0, up to 1")
        above_zero(self, "beta")
        at_least(self, 1, "beta_growth")
        at_least(self, 0, "iterations")

    def check(self, scheme: Scheme) -> None:
        super().check(scheme)
        if scheme.weight.symmetric:
            raise ValueError(
                f"scheme={scheme.name} is symmetric, and hqq moves zero points; use another, as scheme=group64"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        fmt = scheme.weight
        grid.check_finite(weight)
        values = weight.to(grid.compute_dtype(weight))
        rows = len(values) if fmt.granularity == "tensor" else max(1, _CACHED // values.shape[1])
        scale, zero_point = zip(*(self._solve(part, fmt) for part in values.split(rows)), strict=True)
        return round_to_grid(values, torch.cat(scale), torch.cat(zero_point), fmt)

    def _solve(self, values: Tensor, fmt: WeightFormat) -> Params:
        """The best scale and zero point of each group of `values` (N, K), as stored."""
        groups, beta = grid.to_groups(values, fmt), self.beta
        scale, zero_point = best = self._start(groups, fmt)
        decoded = _snap(groups, best, fmt)
        error = groups - decoded
        least = _mean_magnitude(error)
        moving = torch.ones_like(least, dtype=torch.bool)
        for _ in range(self.iterations):
            rest = error.sub_(shrink(error, beta, self.norm))
            scale, zero_point = _fit(decoded, rest, scale, zero_point, fmt)
            decoded = _snap(groups, (scale, zero_point), fmt)
            torch.sub(groups, decoded, out=error)
            found = _mean_magnitude(error)
            moving &= found < least
            if not moving.any():
                break
            least = torch.where(moving, found, least)
            best = torch.where(moving, scale, best[0]), torch.where(moving, zero_point, best[1])
            beta *= self.beta_growth
        return best

    def _start(self, groups: Tensor, fmt: WeightFormat) -> Params:
        scale, zero_point = grid.stored_params(groups.amin(-1), groups.amax(-1), fmt)
        return scale, zero_point.round() if self.round_zero else zero_point


def shrink(error: Tensor, beta: float, norm: float) -> Tensor | float:
    """The e that minimises |e|^p + beta / 2 (e - error)^2 value by value: exactly at p = 1, by one step below it.

    sign(x) max(|x| - |x|^(p - 1) / beta, 0); 0 where that is 0 for all, as of the small errors of most groups.
    """
    size = error.abs()
    if bool(size.amax() <= beta ** (-1 / (2 - norm))):
        return 0.0
    return size.sub_(size.pow(norm - 1).div_(beta)).clamp_(min=0).copysign_(error)


def _fit(decoded: Tensor, rest: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat) -> Params:
    """Sub-problem 2: what brings `decoded` nearest to decoded + rest = W - e in the squared error, codes as they are.

    decoded and rest are (N, G, group_size). The zero point is the mean over a group of code - (W - e) / scale; where it
    is an integer, the scale is fitted.
    """
    if fmt.zero_point == "float":
        found = zero_point - rest.mean(-1) / scale
        return scale, found.to(getattr(torch, fmt.scale_dtype)).to(scale.dtype)
    power = (decoded * decoded).sum(-1)
    fitted = scale * (1 + (decoded * rest).sum(-1) / power)
    largest = torch.finfo(getattr(torch, fmt.scale_dtype)).max
    usable = (power > 0) & (fitted > 0)
    return grid.store_scale(torch.where(usable, fitted, scale).clamp(max=largest), fmt), zero_point


def _snap(groups: Tensor, params: Params, fmt: WeightFormat) -> Tensor:
    return grid.snap(groups, params[0][..., None], params[1][..., None], fmt)


def _mean_magnitude(error: Tensor) -> Tensor:
    return error.abs().mean(-1)
