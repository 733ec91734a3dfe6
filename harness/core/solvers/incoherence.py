"""What methods that rotate a weight on both sides share: the size of the weight, and the Hessian of the rotated inputs.

Tseng et al. 2024, arXiv 2402.04396, section 3.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from harness.core.collected import Hessian
from harness.core.hadamard import rotate
from harness.core.solvers.silent import fill_silent
from harness.core.stats import Stats

_SAFE_TO_SQUARE = 1e-12


def root_mean_square(values: Tensor) -> float:
    """The root of the mean square; also for values whose squares are below float32's range."""
    largest = float(values.abs().max())
    if largest > _SAFE_TO_SQUARE or largest == 0:
        return float(values.square().mean().sqrt())
    return largest * float((values / largest).square().mean().sqrt())


def rotated_hessian(stats: Stats, weight: Tensor, signs: Tensor) -> Tensor:
    """The Hessian (K, K) of the inputs after x diag(signs) Q, for a weight (N, K); silent inputs count as average ones.

    The identity before the rotation, with a warning, if no calibration token reached the linear.
    """
    H, silent = fill_silent(stats[Hessian].value.to(weight))
    if silent.all():
        warnings.warn("no calibration token reached this linear; all its inputs get equal weight", stacklevel=3)
        H = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return rotate(rotate(H * signs).T * signs)
