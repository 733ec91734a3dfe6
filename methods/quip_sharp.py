"""QuIP#: random rotations on both sides of a weight, then lattice codes with error feedback, eight columns at a time.

Paper: Tseng et al. 2024, arXiv 2402.04396: the randomized Hadamard transform (section 3), E8P and residual stages
    (section 4), block LDLQ (section 4.1), fine-tuning (section 5).
Differs: where no Hadamard matrix of a size is constructed the transform has Hartley's for its odd factor; the paper's
    takes a Fourier transform. The codes are revised in `passes` more sweeps, each block of columns given all others,
    where that lowers the loss. Fine-tuning is of one block at a time, and not of the whole model after it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import e8, grid
from harness.core.damping import cholesky, damped_factor
from harness.core.hadamard import random_signs, rotate
from harness.core.incoherent import STAGES, IncoherentQTensor
from harness.core.method import Finetuned
from harness.core.qtensor import QTensor
from harness.core.ranges import above_zero, at_least
from harness.core.scheme import Scheme, require_native
from harness.core.stats import Hessian, Stats

Round = Callable[[Tensor], Tensor]  # (8, n) vectors to (stages, 8, n) points that sum up to near them

# By bits: the standard deviation at which values meet the first codebook, and by how much what is left is magnified for
# the second. They are best for a normal source (tests/test_e8.py).
_SPREAD = {2: 1.03, 3: 0.98, 4: 1.03}
_MAGNIFIED = {2: (), 3: (2.04,), 4: (3.45,)}


@dataclass(frozen=True, kw_only=True)
class QuIPSharp(Finetuned):
    """Two, three or four bits a weight (`bits`), in a format of its own.

    damp    added to the Hessian's diagonal, as a share of its mean
    passes  sweeps over all columns after the first
    spread  share of the codebook's best spread that weights are scaled to; under 1 leaves room for error feedback
    seed    of the random signs
    epochs  of training the signs as real vectors, and the norms, block by block; 0 for none
    """

    needs: ClassVar = (Hessian,)

    damp: float = 0.01
    passes: int = 1
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "damp", "spread")
        at_least(self, 0, "passes", "seed")

    def check(self, scheme: Scheme) -> None:
        require_native(scheme, "lattice codes")
        if scheme.weight.bits not in STAGES:
            raise ValueError(f"bits={scheme.weight.bits} has no codebooks; expected one of {sorted(STAGES)}")

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        grid.check_finite(weight)
        bits, exact = scheme.weight.bits, weight.to(grid.compute_dtype(weight))
        rows, columns = weight.shape
        if columns % e8.WIDTH:
            raise ValueError(f"in_features={columns} is no multiple of {e8.WIDTH}, the weights of a code; skip it")
        generator = torch.Generator().manual_seed(self.seed)
        left, right = (random_signs(size, generator).to(exact) for size in (rows, columns))
        turned = rotate(rotate(exact * right).T * left)  # (K, N): a column of the weight is a row here, contiguous
        hessian = rotate(rotate(_hessian(stats, exact) * right).T * right)
        first = float(turned.square().mean().sqrt()) / (_SPREAD[bits] * self.spread) or 1.0
        scale = [first, *(first / more for more in _MAGNIFIED[bits])]
        points = solve(turned, hessian, self.damp, self.passes, _rounding(bits, scale))
        codes = [
            book.encode((part / step).reshape(-1, e8.WIDTH, rows).transpose(0, 1).flatten(1)).view(-1, rows).T
            for book, part, step in zip(STAGES[bits], points, scale, strict=True)
        ]
        return IncoherentQTensor(codes, bits, torch.tensor(scale), left, right)


def solve(weight: Tensor, hessian: Tensor, damp: float, passes: int, rounding: Round) -> Tensor:
    """Block LDLQ of a transposed weight (K, N) with Hessian (K, K): the points (stages, K, N) of all stages.

    From the last block of eight inputs to the first, each takes up the errors of those before it through the block
    factor L of H = L D L^T (equation 2 of the paper); then `passes` sweeps revise it given all others.
    """
    lower, damped = damped_factor(hessian, damp, cholesky)
    feedback = _unit_blocks(lower)
    points = torch.zeros_like(rounding(weight[: e8.WIDTH]))[:, :1].repeat(1, len(weight), 1)
    error = torch.zeros_like(weight)
    blocks = [slice(start, start + e8.WIDTH) for start in reversed(range(0, len(weight), e8.WIDTH))]
    for cells in blocks:
        after = slice(cells.stop, None)
        points[:, cells] = rounding(weight[cells] + feedback[after, cells].T @ error[after])
        error[cells] = weight[cells] - points[:, cells].sum(0)
    for _ in range(passes):
        for cells in blocks:
            _revise(cells, weight, damped, points, error, rounding)
    return points


def _revise(cells: slice, weight: Tensor, hessian: Tensor, points: Tensor, error: Tensor, rounding: Round) -> None:
    """Round a block of columns anew, given all others; each row keeps what has the smaller loss. Works in place."""
    own, pull = hessian[cells, cells], hessian[cells] @ error
    current = points[:, cells].sum(0)
    trial = rounding(current + torch.linalg.solve(own, pull))
    change = trial.sum(0) - current
    better = (change * (2 * pull - own @ change)).sum(0) > 0
    points[:, cells] = torch.where(better, trial, points[:, cells])
    error[cells] -= torch.where(better, change, 0)


def _unit_blocks(lower: Tensor) -> Tensor:
    """L (K, K) of H = L D L^T with blocks of 8 on the diagonal of D, from H's Cholesky factor."""
    count = len(lower) // e8.WIDTH
    panels = lower.view(len(lower), count, e8.WIDTH)
    own = torch.stack([panels[i * e8.WIDTH : (i + 1) * e8.WIDTH, i] for i in range(count)])
    return torch.einsum("rkc,kcd->rkd", panels, torch.linalg.inv(own)).reshape(lower.shape)


def _rounding(bits: int, scale: Sequence[float]) -> Round:
    """Nearest points, stage after stage, each of what those before it left."""

    def rounded(vectors: Tensor) -> Tensor:
        found = []
        for book, step in zip(STAGES[bits], scale, strict=True):
            found.append(book.nearest(vectors / step) * step)
            vectors = vectors - found[-1]
        return torch.stack(found)

    return rounded


def _hessian(stats: Stats, weight: Tensor) -> Tensor:
    if not int(stats[Hessian].tokens):
        warnings.warn("no calibration token reached it, so all its inputs count alike", stacklevel=3)
        return torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    return stats[Hessian].value.to(weight)
