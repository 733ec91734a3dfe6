"""A Hessian that is damped until it can be factored."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_MORE = 10.0
_MOST = 10.0


def damped_factor(hessian: Tensor, damp: float, factor: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, Tensor]:
    """What `factor` makes of a damped Hessian (K, K), and that Hessian.

    `damp` times the mean of the diagonal is added to it, ten times more whenever `factor` gives None, with a warning.
    Raises: ValueError if no damping up to 10 makes it positive definite.
    """
    mean, used = hessian.diagonal().mean(), damp
    while used <= max(_MOST, damp):
        damped = hessian + torch.diag_embed((used * mean).expand(len(hessian)))
        found = factor(damped)
        if found is not None:
            if used != damp:
                warnings.warn(f"damp={damp:g} was raised to {used:g}, where the Hessian can be factored", stacklevel=3)
            return found, damped
        used *= _MORE
    raise ValueError(
        f"damp={damp:g} was raised to {used / _MORE:g} and the Hessian still has no factor; check the data"
    )


def cholesky(matrix: Tensor, upper: bool = False) -> Tensor | None:
    """Lower C with matrix = C C^T, or `upper` U with U^T U; None if it is not positive definite in its precision."""
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return None if failed or not torch.isfinite(factor).all() else factor
