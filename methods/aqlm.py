"""AQLM: represent each group of eight weights as a sum of codebook vectors, fitted to the weight and its inputs.

Paper: Egiazarian et al. 2024, arXiv 2401.06118, section 3 and algorithm 1: phase 1 (codes), phase 2 (codebooks and
    scales) and phase 3 (fine-tuning of a block).
Differs: codebooks are fitted by preconditioned conjugate gradients on their least squares problem, and scales in closed
    form, instead of the authors' 100 steps of Adam: this takes fewer passes and no learning rate. k-means weights each
    coordinate by the Hessian's diagonal and the row's scale, and trains on a sample; the authors' k-means is
    unweighted. The beam search keeps combinations of codes for one group, for all rows at once, and replaces the code
    of one codebook after another. Codebooks and scales are rounded to float16 before the final search for codes. The
    Hessian is damped. The fine-tuning target of a block is the float model's output for float inputs; the authors' is
    the output for inputs from the quantized blocks before it. Inputs that are zero on all calibration tokens count as
    average inputs, with a warning.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Finetuned, Hessian, QTensor, Scheme, Stats, above_zero, at_least, require_none
from harness.core.finite import check_finite
from harness.core.formats import AdditiveQTensor
from harness.core.formats.additive import half
from harness.core.solvers.additive_fit import Fit, Problem
from harness.core.solvers.kmeans import assign, kmeans
from harness.core.solvers.silent import fill_silent

_SAMPLE = 64  # training vectors of k-means for each codebook entry
_FEWEST_BITS, _MOST_BITS = 2, 8  # the range of `bits`
_EXTREME = 10  # for weights of magnitude 2^power with a larger |power|, float16 scales alone do not suffice


@dataclass(frozen=True, kw_only=True)
class AQLM(Finetuned):
    """Additive codebooks that minimise the output error, measured by the Hessian of the inputs.

    bits               of one weight, rounded up: what the codebooks take; names the row
    codebooks          number of codebooks; each group is a sum of one vector from each
    code_bits          bits of one code: a codebook has 2^code_bits vectors
    group_size         consecutive weights of a row that one sum of vectors represents
    beam               combinations kept in the search for one group's codes; 1: a greedy search, codebook by codebook
    iterations         maximum number of rounds; each round updates codebooks, codes and scales
    tolerance          stop when a round lowers the error by less than this share
    codebook_steps     conjugate gradient steps in each round
    kmeans_iterations  k-means iterations that initialise each codebook
    damp               added to the Hessian's diagonal, as a share of the diagonal's mean
    seed               of k-means and of the order in which groups are searched
    epochs             of fine-tuning codebooks, scales and norms, block by block; 0: no fine-tuning
    """

    needs: ClassVar = (Hessian,)

    bits: int = 2
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
        require_none(scheme, "additive codebooks")
        bits = max(_FEWEST_BITS, math.ceil(self.codebooks * self.code_bits / self.group_size))
        if bits > _MOST_BITS:
            raise ValueError(
                f"codebooks={self.codebooks} of code_bits={self.code_bits} for group_size={self.group_size} take "
                f"{bits} bits per weight; expected at most {_MOST_BITS}, use fewer codebooks"
            )
        if self.bits != bits:
            raise ValueError(
                f"bits={self.bits} does not match codebooks={self.codebooks} of code_bits={self.code_bits} "
                f"for group_size={self.group_size}; use bits={bits}"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        check_finite(weight)
        if weight.shape[1] % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide in_features={weight.shape[1]}; use a divisor, "
                "or skip this linear"
            )
        power = _power(weight)
        W = (weight.double() * 2.0**-power).float()
        problem = Problem(W, self._hessian(stats[Hessian], W), self.group_size)
        generator = torch.Generator().manual_seed(self.seed)
        fit = self._start(problem, generator)
        self._alternate(problem, fit, generator)
        return self._store(problem, fit, power, generator)

    def _hessian(self, stat: Hessian, W: Tensor) -> Tensor:
        """Damped Hessian (K, K), scaled so that its mean diagonal is 1 + damp."""
        eye = torch.eye(W.shape[1], device=W.device)
        H = fill_silent(stat.value.to(W))[0]
        mean = H.diagonal().mean()
        if not mean > 0:
            warnings.warn("no calibration token reached this linear; all its inputs get equal weight", stacklevel=3)
            return eye
        return H.div_(mean).add_(eye, alpha=self.damp)

    def _start(self, problem: Problem, generator: torch.Generator) -> Fit:
        """Initialise by residual k-means: each codebook fits what the previous ones left, on rows of equal norm."""
        N = len(problem.weight)
        norm = problem.weight.square().mean(1).sqrt()
        scale = torch.where(norm > 0, norm, 1.0)
        residual = (problem.weight / scale[:, None]).view(-1, self.group_size)
        weights = (scale.square()[:, None] * problem.hessian.diagonal()).view(-1, self.group_size)
        sample = torch.randperm(len(residual), generator=generator)[: _SAMPLE << self.code_bits].to(residual.device)
        codebooks, codes = [], []
        for _ in range(self.codebooks):
            entries, _ = kmeans(
                residual[sample], weights[sample], 1 << self.code_bits, self.kmeans_iterations, generator
            )
            indices, _ = assign(residual, weights, entries)
            residual = residual - entries[indices]
            codebooks.append(entries)
            codes.append(indices.view(N, -1).T)
        return Fit(torch.stack(codes, 1).contiguous(), torch.stack(codebooks), scale)

    def _alternate(self, problem: Problem, fit: Fit, generator: torch.Generator) -> None:
        """Update codebooks, codes and scales in turn, until a round lowers the error by less than `tolerance`."""
        slope, loss = problem.rescale(fit)
        for _ in range(self.iterations):
            problem.refit(fit, slope, self.codebook_steps)
            problem.search(fit, self.beam, generator)
            previous_loss = loss
            slope, loss = problem.rescale(fit)
            if loss > previous_loss * (1 - self.tolerance):
                break

    def _store(self, problem: Problem, fit: Fit, power: int, generator: torch.Generator) -> AdditiveQTensor:
        """Round codebooks and scales to float16, then search the codes again for the rounded values.

        The weight's magnitude 2^power goes into the scales; for an extreme power, half of it goes into the codebooks.
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
    """Exponent of the power of two nearest to the weight's root mean square; 0 for a weight of zeros."""
    mean_square = float(weight.double().square().mean())
    return round(math.log2(mean_square) / 2) if mean_square > 0 else 0
