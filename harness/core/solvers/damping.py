"""Damping of a Hessian, raised until the Hessian can be factored."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from harness.core.finite import all_finite

_MORE = 10.0
_MOST = 10.0


def damped_factor(hessian: Tensor, damp: float, factor: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, Tensor]:
    """Damp a Hessian (K, K) and factor it.

    `damp` times the mean of the diagonal is added to the diagonal. Each time `factor` returns None, the damping is
    multiplied by ten; a warning reports the value that succeeds.
    Returns: the result of `factor`, and the damped Hessian.
    Raises: ValueError if no damping up to 10 makes the Hessian positive definite.
    """
    mean, used = hessian.diagonal().mean(), damp
    while used <= max(_MOST, damp):
        damped = hessian + torch.diag_embed((used * mean).expand(len(hessian)))
        factored = factor(damped)
        if factored is not None:
            if used != damp:
                warnings.warn(f"damp={damp:g} was raised to {used:g} so that the Hessian can be factored", stacklevel=3)
            return factored, damped
        used *= _MORE
    raise ValueError(
        f"damp={damp:g} was raised to {used / _MORE:g} and the Hessian is still not positive definite; check the data"
    )


def cholesky(matrix: Tensor, upper: bool = False) -> Tensor | None:
    """Cholesky factor of a matrix: lower C with C C^T, or with `upper` U with U^T U.

    Returns: None if the matrix is not positive definite in its floating point precision.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
    return None if failed or not all_finite(factor) else factor
