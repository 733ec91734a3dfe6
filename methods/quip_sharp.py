"""QuIP#: rotate a weight randomly on both sides, then choose lattice codes of eight columns at a time with feedback.

Paper: Tseng et al. 2024, arXiv 2402.04396: the randomized Hadamard transform (section 3), E8P and residual stages
    (section 4), block LDLQ (section 4.1), fine-tuning (section 5).
Differs: for a size without a known Hadamard matrix, the transform uses a Hartley matrix for the odd factor; the paper
    uses a Fourier transform. `passes` more sweeps revise the codes: each block of columns is rounded again with all
    other columns fixed, and the new codes are used where they lower the loss. Fine-tuning trains one decoder block at
    a time; the whole model is not fine-tuned afterwards. Inputs that are zero on all calibration tokens count as
    average inputs, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Finetuned, Hessian, QTensor, Scheme, Stats, above_zero, at_least, require_none
from harness.core.finite import check_finite
from harness.core.formats import IncoherentQTensor, compute_dtype, lattice
from harness.core.formats.incoherent import STAGES
from harness.core.hadamard import random_signs, rotate
from harness.core.solvers.damping import cholesky, damped_factor
from harness.core.solvers.silent import fill_silent

Round = Callable[[Tensor], Tensor]  # maps vectors (8, n) to points (stages, 8, n) whose sum over stages is near them

# For each `bits`: the standard deviation to which values are scaled for the first codebook, and the factor by which the
# remaining error is magnified for the second. These values are optimal for a normal source (tests/test_e8.py).
_SPREAD = {2: 1.03, 3: 0.98, 4: 1.03}
_MAGNIFIED = {2: (), 3: (2.04,), 4: (3.45,)}
_ALMOST_ZERO = 1e-30  # scale of a weight of zeros: the codebook has no point at 0
_SAFE_TO_SQUARE = 1e-12


@dataclass(frozen=True, kw_only=True)
class QuIPSharp(Finetuned):
    """Lattice codes.

    bits    per weight: 2, 3 or 4
    damp    added to the Hessian's diagonal, as a share of the diagonal's mean
    passes  sweeps over all columns after the first one
    spread  scale of the weights, as a share of the codebook's optimal spread; below 1 leaves room for error feedback
    seed    of the random signs
    epochs  of fine-tuning the signs as real vectors, and the norms, block by block; 0: no fine-tuning
    """

    needs: ClassVar = (Hessian,)

    bits: int = 2
    damp: float = 0.01
    passes: int = 1
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "damp", "spread")
        at_least(self, 0, "passes", "seed")
        if self.bits not in STAGES:
            raise ValueError(f"bits={self.bits} is out of range for lattice codes; expected one of {sorted(STAGES)}")

    def check(self, scheme: Scheme) -> None:
        require_none(scheme, "lattice codes")

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        check_finite(weight)
        bits, W = self.bits, weight.to(compute_dtype(weight))
        N, K = weight.shape
        if K % lattice.WIDTH:
            raise ValueError(
                f"in_features={K} is not a multiple of {lattice.WIDTH}, the weights of one code; skip this linear"
            )
        generator = torch.Generator().manual_seed(self.seed)
        left, right = (random_signs(size, generator).to(W) for size in (N, K))
        W_T = rotate(rotate(W * right).T * left)  # (K, N): each column of the weight is contiguous
        H = rotate(rotate(_hessian(stats, W) * right).T * right)
        base_scale = _root_mean_square(W_T) / (_SPREAD[bits] * self.spread) or _ALMOST_ZERO
        scale = [base_scale, *(base_scale / factor for factor in _MAGNIFIED[bits])]
        points = solve(W_T, H, self.damp, self.passes, _rounding(bits, scale))
        codes = [
            book.encode((stage_points / step).reshape(-1, lattice.WIDTH, N).transpose(0, 1).flatten(1)).view(-1, N).T
            for book, stage_points, step in zip(STAGES[bits], points, scale, strict=True)
        ]
        return IncoherentQTensor(codes, bits, torch.tensor(scale), left, right)


def solve(weight: Tensor, hessian: Tensor, damp: float, passes: int, rounding: Round) -> Tensor:
    """Round a transposed weight (K, N) by block LDLQ with Hessian (K, K).

    Blocks of eight inputs are rounded from the last to the first. Before a block is rounded, the errors of the blocks
    after it, multiplied by the factor L of H = L D L^T, are added to it (equation 2 of the paper). Then `passes` sweeps
    revise each block with all other blocks fixed.

    Returns: the points (stages, K, N) of all stages.
    """
    cholesky_factor, H = damped_factor(hessian, damp, cholesky)
    L = _unit_blocks(cholesky_factor)
    points = torch.zeros_like(rounding(weight[: lattice.WIDTH]))[:, :1].repeat(1, len(weight), 1)
    Err = torch.zeros_like(weight)
    blocks = [slice(start, start + lattice.WIDTH) for start in reversed(range(0, len(weight), lattice.WIDTH))]
    for cells in blocks:
        later = slice(cells.stop, None)
        points[:, cells] = rounding(weight[cells] + L[later, cells].T @ Err[later])
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


def _unit_blocks(lower: Tensor) -> Tensor:
    """L (K, K) of H = L D L^T, where D has 8 by 8 blocks on its diagonal, from the Cholesky factor of H."""
    count = len(lower) // lattice.WIDTH
    panels = lower.view(len(lower), count, lattice.WIDTH)
    diagonal_blocks = torch.stack([panels[i * lattice.WIDTH : (i + 1) * lattice.WIDTH, i] for i in range(count)])
    return torch.einsum("rkc,kcd->rkd", panels, torch.linalg.inv(diagonal_blocks)).reshape(lower.shape)


def _rounding(bits: int, scale: Sequence[float]) -> Round:
    """Return a function that rounds to the nearest point of each stage; later stages round the remaining error."""

    def rounded(vectors: Tensor) -> Tensor:
        points = []
        for book, step in zip(STAGES[bits], scale, strict=True):
            points.append(book.nearest(vectors / step) * step)
            vectors = vectors - points[-1]
        return torch.stack(points)

    return rounded


def _root_mean_square(values: Tensor) -> float:
    """The root of the mean square; also for values whose squares are below float32's range."""
    largest = float(values.abs().max())
    if largest > _SAFE_TO_SQUARE or largest == 0:
        return float(values.square().mean().sqrt())
    return largest * float((values / largest).square().mean().sqrt())


def _hessian(stats: Stats, weight: Tensor) -> Tensor:
    H, silent = fill_silent(stats[Hessian].value.to(weight))
    if silent.all():
        warnings.warn("no calibration token reached this linear; all its inputs get equal weight", stacklevel=3)
        return torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return H
