"""Half-quadratic quantization: adjust each group's zero point to minimise the weight error in a sparse norm.

Paper: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml's blog), with the
    constants of the authors' code (mobiusml/hqq core/optimize.py). e replaces W - W' in |W - W'|_p^p; e and
    the zero point are solved in turn (sub-problems 1 and 2), while the coupling beta between e and W - W' grows.
Differs: each group stops separately when its mean |W - W'| no longer decreases, and keeps its best parameters; the
    authors stop a whole layer. This gives lower perplexity, and rows do not affect each other. The optimised
    parameters have the dtype that is stored; the authors' are float32. `round_zero` starts from an integer zero point
    and stores a float; the authors do this only at 4 bits, and at 3 bits it decides the result. A zero point that
    the scheme stores as an integer cannot be adjusted, because it moves by less than half a code; then the same
    sub-problem is solved for the scale, starting from the range extended to include 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.core import IntWeight, Method, QTensor, Scheme, Stats, above_zero, at_least
from harness.core.finite import check_finite
from harness.core.formats import Params, compute_dtype, scales

_CACHED = 2**17  # weights that are solved at once, so that they stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class HQQ(Method):
    """Fits zero points, or scales, to the weight alone; needs no calibration data.

    norm         p of |W - W'|_p^p
    beta         initial coupling; errors below beta^(-1 / (2 - p)) are not outliers
    beta_growth  factor of beta from one iteration to the next
    iterations   maximum number of iterations for each group
    round_zero   start float zero points from integers, so that 0.0 is near a code
    """

    norm: float = 0.7
    beta: float = 10.0
    beta_growth: float = 1.01
    iterations: int = 20
    round_zero: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1:
            raise ValueError(f"norm={self.norm} is out of range; expected more than 0, at most 1")
        above_zero(self, "beta")
        at_least(self, 1, "beta_growth")
        at_least(self, 0, "iterations")

    def check(self, scheme: Scheme) -> None:
        fmt = scheme.format
        if not isinstance(fmt, IntWeight):
            raise ValueError(
                f"scheme={scheme.name} has codes of {fmt.label}, but hqq adjusts zero points; use an integer "
                "scheme such as scheme=group64"
            )
        if fmt.symmetric:
            raise ValueError(
                f"scheme={scheme.name} is symmetric, but hqq adjusts zero points; use an asymmetric scheme such as "
                "scheme=group64"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        fmt = scheme.weight
        assert isinstance(fmt, IntWeight)
        check_finite(weight)
        W = weight.to(compute_dtype(weight))
        rows = len(W) if fmt.granularity == "tensor" else max(1, _CACHED // W.shape[1])
        params = Params.cat([self._solve(part, fmt) for part in W.split(rows)])
        fmt.check_scales(W, params)
        return fmt.quantized(W, params)

    def _solve(self, W: Tensor, fmt: IntWeight) -> Params:
        """Return the best scale and zero point of each group of W (N, K), in their stored precision."""
        groups, beta = fmt.to_groups(W), self.beta
        params = best = self._start(groups, fmt)
        W_r = fmt.snap(groups, best.spread())
        error = groups - W_r
        best_error = _mean_magnitude(error)
        improving = torch.ones_like(best_error, dtype=torch.bool)
        for _ in range(self.iterations):
            target_change = error.sub_(shrink(error, beta, self.norm))
            params = _fit(W_r, target_change, params, fmt)
            W_r = fmt.snap(groups, params.spread())
            torch.sub(groups, W_r, out=error)
            mean_error = _mean_magnitude(error)
            improving &= mean_error < best_error
            if not improving.any():
                break
            best_error = torch.where(improving, mean_error, best_error)
            best = params.where(improving, best)
            beta *= self.beta_growth
        return best

    def _start(self, groups: Tensor, fmt: IntWeight) -> Params:
        params = fmt.params(groups)
        assert params.zero_point is not None
        return Params(params.scale, params.zero_point.round() if self.round_zero else params.zero_point)


def shrink(error: Tensor, beta: float, norm: float) -> Tensor | float:
    """Sub-problem 1: the e that minimises |e|^p + beta / 2 (e - error)^2 for each value.

    e = sign(x) max(|x| - |x|^(p - 1) / beta, 0) with x = error: exact for p = 1, one step of an iteration for p < 1.

    Returns: e in the shape of `error`, which is unchanged; the float 0.0 if all of e is 0, as in most groups, where
    errors are small.
    """
    magnitude = error.abs()
    if bool(magnitude.amax() <= beta ** (-1 / (2 - norm))):
        return 0.0
    return magnitude.sub_(magnitude.pow(norm - 1).div_(beta)).clamp_(min=0).copysign_(error)


def _fit(W_r: Tensor, target_change: Tensor, params: Params, fmt: IntWeight) -> Params:
    """Sub-problem 2: with fixed codes, fit W' to W - e = W' + target_change by least squares.

    W_r is W' and target_change is W - e - W', both (N, G, group_size). A float zero point becomes the group's mean of
    code - (W - e) / scale; if zero points are integers, the scale is fitted instead.
    """
    scale, zero_point = params.scale, params.zero_point
    assert zero_point is not None
    if fmt.zero_point == "float":
        fitted_zero = zero_point - target_change.mean(-1) / scale
        return Params(scale, fitted_zero.to(getattr(torch, fmt.scale_dtype)).to(scale.dtype))
    energy = (W_r * W_r).sum(-1)
    fitted_scale = scale * (1 + (W_r * target_change).sum(-1) / energy)
    largest = torch.finfo(getattr(torch, fmt.scale_dtype)).max
    usable = (energy > 0) & (fitted_scale > 0)
    fitted_scale = torch.where(usable, fitted_scale, scale).clamp(max=largest)
    return Params(scales.store(fitted_scale, fmt.scale_dtype, fmt.where), zero_point)


def _mean_magnitude(error: Tensor) -> Tensor:
    return error.abs().mean(-1)
