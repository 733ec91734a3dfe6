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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Finetuned, Hessian, QTensor, Scheme, Stats, above_zero, at_least, require_none
from harness.core.finite import check_finite
from harness.core.formats import IncoherentQTensor, compute_dtype, lattice
from harness.core.formats.incoherent import STAGES
from harness.core.hadamard import random_signs, rotate
from harness.core.solvers.block_ldlq import Round, solve
from harness.core.solvers.incoherence import root_mean_square, rotated_hessian

# For each `bits`: the standard deviation to which values are scaled for the first codebook, and the factor by which the
# remaining error is magnified for the second. These values are optimal for a normal source (tests/test_e8.py).
_SPREAD = {2: 1.03, 3: 0.98, 4: 1.03}
_MAGNIFIED = {2: (), 3: (2.04,), 4: (3.45,)}
_ALMOST_ZERO = 1e-30  # scale of a weight of zeros: the codebook has no point at 0


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
        H = rotated_hessian(stats, W, right)
        base_scale = root_mean_square(W_T) / (_SPREAD[bits] * self.spread) or _ALMOST_ZERO
        scale = [base_scale, *(base_scale / factor for factor in _MAGNIFIED[bits])]
        points = solve(W_T, H, self.damp, self.passes, _rounding(bits, scale), lattice.WIDTH)
        codes = [
            book.encode((stage_points / step).reshape(-1, lattice.WIDTH, N).transpose(0, 1).flatten(1)).view(-1, N).T
            for book, stage_points, step in zip(STAGES[bits], points, scale, strict=True)
        ]
        return IncoherentQTensor(codes, bits, torch.tensor(scale), left, right)


def _rounding(bits: int, scale: Sequence[float]) -> Round:
    """Return a function that rounds to the nearest point of each stage; later stages round the remaining error."""

    def rounded(vectors: Tensor) -> Tensor:
        points = []
        for book, step in zip(STAGES[bits], scale, strict=True):
            points.append(book.nearest(vectors / step) * step)
            vectors = vectors - points[-1]
        return torch.stack(points)

    return rounded
