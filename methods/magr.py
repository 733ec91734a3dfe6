"""MagR: weights with smaller ranges that compute nearly the same on the calibration data; a step before others.

Paper: Zhang et al. 2024, arXiv 2406.00800, section 3: min_w 1/2 (w - w0) H (w - w0)^T + alpha max|w| for each row, by
    proximal gradient steps, with H scaled to the largest eigenvalue 1, so that the step size is 1; the proximal map of
    the maximum is v - P(v), with P the projection onto the l1 ball of radius alpha (section 3.2). With groups, each
    group has a maximum of its own (section 4).
Differs: alpha is a share of the root mean square of each group's weights, so that it does not depend on the scale of a
    model's weights. Inputs that were zero on all calibration tokens keep their weights, which H does not see.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Hessian, Method, Scheme, Stats, above_zero, at_least
from harness.core.finite import check_finite
from harness.core.formats import compute_dtype
from harness.core.solvers.silent import warn_silent

_POWER_STEPS = 30  # of the power iteration for the largest eigenvalue
_MARGIN = 1.01  # of the eigenvalue, which the iteration approaches from below


@dataclass(frozen=True, kw_only=True)
class MagR(Method):
    """Magnitude reduction of each group's weights.

    alpha  weight of the maximum, as a share of the root mean square of a group's weights
    steps  of proximal gradient descent
    """

    needs: ClassVar = (Hessian,)

    alpha: float = 0.05
    steps: int = 50

    def __post_init__(self) -> None:
        above_zero(self, "alpha")
        at_least(self, 1, "steps")

    def adjust(self, weight: Tensor, scheme: Scheme, stats: Stats) -> Tensor:
        check_finite(weight)
        if not int(stats[Hessian].tokens):
            warnings.warn("no calibration token reached this linear; its weight is not adjusted", stacklevel=2)
            return weight
        fmt, exact = scheme.format, weight.to(compute_dtype(weight))
        H = stats[Hessian].value.to(exact)
        silent = H.diagonal() == 0
        if silent.any():
            warn_silent(silent, "their weights are not adjusted", stacklevel=2)
        if silent.all():
            return weight
        H = H / stats.shared((MagR, exact.dtype), lambda: largest_eigenvalue(H))
        radius = self.alpha * fmt.to_groups(exact).square().mean(-1, keepdim=True).sqrt()
        W = exact
        for _ in range(self.steps):
            V = W - (W - exact) @ H
            V = fmt.from_groups(reduced(fmt.to_groups(V), radius), (weight.shape[0], weight.shape[1]))
            W = torch.where(silent, exact, V)
        return W.to(weight.dtype)


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """An upper bound, about 1 % above, of the largest eigenvalue of a symmetric matrix (K, K) without negative ones."""
    vector = torch.ones(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(_POWER_STEPS):
        vector = matrix @ vector
        vector = vector / vector.norm()
    bound: Tensor = _MARGIN * (matrix @ vector).norm()
    return bound


def reduced(values: Tensor, radius: Tensor) -> Tensor:
    """The proximal map of radius max|v| on the last axis of `values` (..., n): v - P(v), with `radius` (..., 1).

    P projects onto the l1 ball: it takes a common amount off the magnitudes (Duchi et al. 2008, figure 1), to which
    v - P(v) clips them.
    """
    magnitudes = values.abs()
    descending = magnitudes.sort(-1, descending=True).values
    counts = torch.arange(1, values.shape[-1] + 1, dtype=values.dtype, device=values.device)
    amounts = (descending.cumsum(-1) - radius) / counts
    last = (descending > amounts).sum(-1, keepdim=True) - 1
    limit = amounts.gather(-1, last.clamp(min=0)).clamp(min=0)  # 0 where the ball holds all of it
    return torch.minimum(torch.maximum(values, -limit), limit)
