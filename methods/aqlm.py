"""AQLM: groups of eight weights as sums of vectors, from codebooks that are fitted to the weight and its inputs.

Paper: Egiazarian et al. 2024, arXiv 2401.06118, section 3 and algorithm 1: phase 1 (codes), phase 2 (codebooks and
    scales) and phase 3 (fine-tuning of a block).
Differs: codebooks follow by preconditioned conjugate gradients on the least squares problem that they solve, where the
    authors take 100 steps of Adam, and scales in closed form: fewer passes, and no learning rate. k-means weighs each
    coordinate by the Hessian's diagonal and the row's scale, where theirs is plain, and trains on a sample. The beam
    holds combinations of one group's codes, all rows at once, and replaces one codebook's code after another. Floats
    are rounded to float16 before the last choice of codes. The Hessian is damped. A block is fine-tuned towards the
    float model's output of float inputs, where theirs is that of the inputs which the quantized blocks before give.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import grid
from harness.core.additive import AdditiveQTensor, half
from harness.core.additive_fit import Fit, Problem
from harness.core.kmeans import assign, kmeans
from harness.core.method import Finetuned
from harness.core.qtensor import QTensor
from harness.core.ranges import above_zero, at_least
from harness.core.scheme import Scheme, require_native
from harness.core.stats import Hessian, Stats

_SAMPLE = 64  # vectors for each entry that k-means sees
_FEWEST_BITS, _MOST_BITS = 2, 8  # that a scheme has
_EXTREME = 10  # powers of two from 1 at which float16 needs help


@dataclass(frozen=True, kw_only=True)
class AQLM(Finetuned):
    """Additive codebooks under the Hessian of the inputs.

    codebooks          vectors that are added up for each group
    code_bits          a codebook has 2^code_bits of them
    group_size         neighbouring inputs of a row that one sum stands for
    beam               combinations kept while one group's codes are searched; 1: one codebook's code after another
    iterations         rounds of codebooks, codes and scales at most
    tolerance          rounds end when one leaves more than this share less than 1 of the error
    codebook_steps     conjugate gradients a round
    kmeans_iterations  of each codebook's start
    damp               added to the Hessian's diagonal, as a share of its mean
    seed               of the k-means and of the order in which groups are searched
    epochs             of training codebooks, scales and norms, block by block; 0 for none
    """

    needs: ClassVar = (Hessian,)

    codebooks: int = 2
    code_bits: int = 8
    group_size: int = 8
    beam: int = 4
    iterations: int = 30
    tolerance: float = 0.01
    codebook_steps: int = 2
    kmeans_iterations: int = 25
    damp: float = 0.01
    seed: int = 0
    epochs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "codebooks", "group_size", "beam", "codebook_steps")
        at_least(self, 0, "iterations", "kmeans_iterations", "seed")
        above_zero(self, "damp")
        if not 1 <= self.code_bits <= 16:
            raise ValueError(f"code_bits={self.code_bits} is out of range; expected 1 to 16")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} is out of range; expected 0 or more, and less than 1")

    def check(self, scheme: Scheme) -> None:
        require_native(scheme, "additive codebooks")
        bits = max(_FEWEST_BITS, math.ceil(self.codebooks * self.code_bits / self.group_size))
        if bits > _MOST_BITS:
            raise ValueError(
                f"codebooks={self.codebooks} of code_bits={self.code_bits} for group_size={self.group_size} take "
                f"{bits} bits a weight; expected {_MOST_BITS} or less, use fewer codebooks"
            )
        if scheme.weight.bits != bits:
            raise ValueError(
                f"bits={scheme.weight.bits} is not what codebooks={self.codebooks} of code_bits={self.code_bits} for "
                f"group_size={self.group_size} take; use bits={bits}"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        grid.check_finite(weight)
        if weight.shape[1] % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide in_features={weight.shape[1]}; use a divisor, or skip it"
            )
        power = _power(weight)
        values = (weight.double() * 2.0**-power).float()
        problem = Problem(values, self._hessian(stats[Hessian], values), self.group_size)
        generator = torch.Generator().manual_seed(self.seed)
        fit = self._start(problem, generator)
        self._alternate(problem, fit, generator)
        return self._store(problem, fit, power, generator)

    def _hessian(self, stat: Hessian, values: Tensor) -> Tensor:
        """The damped Hessian (K, K) of mean diagonal 1 + damp."""
        eye = torch.eye(values.shape[1], device=values.device)
        found = stat.value.to(values)
        mean = found.diagonal().mean()
        if not mean > 0:
            warnings.warn("no calibration token reached it, so all its inputs count alike", stacklevel=3)
            return eye
        return found.div_(mean).add_(eye, alpha=self.damp)

    def _start(self, problem: Problem, generator: torch.Generator) -> Fit:
        """Residual k-means: each codebook on what those before it leave of rows of one norm."""
        rows = len(problem.weight)
        norm = problem.weight.square().mean(1).sqrt()
        scale = torch.where(norm > 0, norm, 1.0)
        left = (problem.weight / scale[:, None]).view(-1, self.group_size)
        weights = (scale.square()[:, None] * problem.hessian.diagonal()).view(-1, self.group_size)
        sample = torch.randperm(len(left), generator=generator)[: _SAMPLE << self.code_bits].to(left.device)
        codebooks, codes = [], []
        for _ in range(self.codebooks):
            entries, _ = kmeans(left[sample], weights[sample], 1 << self.code_bits, self.kmeans_iterations, generator)
            chosen, _ = assign(left, weights, entries)
            left = left - entries[chosen]
            codebooks.append(entries)
            codes.append(chosen.view(rows, -1).T)
        return Fit(torch.stack(codes, 1).contiguous(), torch.stack(codebooks), scale)

    def _alternate(self, problem: Problem, fit: Fit, generator: torch.Generator) -> None:
        """Codebooks, codes and scales in turn until a round gains too little."""
        slope, loss = problem.rescale(fit)
        for _ in range(self.iterations):
            problem.refit(fit, slope, self.codebook_steps)
            problem.search(fit, self.beam, generator)
            before = loss
            slope, loss = problem.rescale(fit)
            if loss > before * (1 - self.tolerance):
                break

    def _store(self, problem: Problem, fit: Fit, power: int, generator: torch.Generator) -> AdditiveQTensor:
        """Codes chosen once more for codebooks and scales as float16 holds them.

        The weight's magnitude, 2^power, goes to the scales, and half of it to the codebooks where it is extreme.
        """
        shared = power // 2 if abs(power) > _EXTREME else 0
        codebooks = half(fit.codebooks * 2.0**shared, "codebooks")
        fit.codebooks = codebooks.float() * 2.0**-shared
        problem.rescale(fit)
        scale = half(fit.scale * 2.0 ** (power - shared), "scale")
        fit.scale = scale.float() * 2.0 ** (shared - power)
        problem.search(fit, self.beam, generator)
        return AdditiveQTensor(fit.codes, codebooks, scale)


def _power(weight: Tensor) -> int:
    """The power of two next to a weight's root mean square; 0 for a weight of zeros."""
    square = float(weight.double().square().mean())
    return round(math.log2(square) / 2) if square > 0 else 0
