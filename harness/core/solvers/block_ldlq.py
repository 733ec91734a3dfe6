"""Block LDLQ: rounds a block of inputs after another, with feedback of the errors of all blocks before.

Tseng et al. 2024, arXiv 2402.04396, section 4.1 and equation 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.core.solvers.damping import cholesky, damped_factor

Round = Callable[[Tensor], Tensor]  # maps vectors (width, n) to points (stages, width, n) whose sum is near them


def solve(weight: Tensor, hessian: Tensor, damp: float, passes: int, rounding: Round, width: int) -> Tensor:
    """Round a transposed weight (K, N) by block LDLQ with Hessian (K, K).

    Blocks of `width` inputs are rounded from the last to the first, each by one call of `rounding`. Before a block is
    rounded, the errors of the blocks after it, multiplied by the factor L of H = L D L^T, are added to it (equation 2
    of the paper). Then `passes` sweeps revise each block with all other blocks fixed.

    Returns: the points (stages, K, N) of all stages.
    """
    cholesky_factor, H = damped_factor(hessian, damp, cholesky)
    L = _unit_blocks(cholesky_factor, width)
    Err, points = torch.zeros_like(weight), torch.empty(0)
    blocks = [slice(start, start + width) for start in reversed(range(0, len(weight), width))]
    for cells in blocks:
        later = slice(cells.stop, None)
        rounded = rounding(weight[cells] + L[later, cells].T @ Err[later])
        points = points if len(points) else rounded.new_zeros(len(rounded), *weight.shape)
        points[:, cells] = rounded
        Err[cells] = weight[cells] - points[:, cells].sum(0)
    for _ in range(passes):
        for cells in blocks:
            _revise(cells, weight, H, points, Err, rounding)
    return points


def _revise(cells: slice, weight: Tensor, H: Tensor, points: Tensor, Err: Tensor, rounding: Round) -> None:
    """Round one block of columns again with all others fixed, and keep the better result for each row; in place.

    The loss is smallest at current + H_block^-1 gradient, where gradient is H Err in the rows of the block.
    """
    H_block, gradient = H[cells, cells], H[cells] @ Err
    current = points[:, cells].sum(0)
    trial = rounding(current + torch.linalg.solve(H_block, gradient))
    change = trial.sum(0) - current
    better = (change * (2 * gradient - H_block @ change)).sum(0) > 0
    points[:, cells] = torch.where(better, trial, points[:, cells])
    Err[cells] -= torch.where(better, change, 0)


def _unit_blocks(lower: Tensor, width: int) -> Tensor:
    """L (K, K) of H = L D L^T, where D has blocks of `width` on its diagonal, from the Cholesky factor of H."""
    count = len(lower) // width
    panels = lower.view(len(lower), count, width)
    diagonal_blocks = torch.stack([panels[i * width : (i + 1) * width, i] for i in range(count)])
    return torch.einsum("rkc,kcd->rkd", panels, torch.linalg.inv(diagonal_blocks)).reshape(lower.shape)
