"""Qronos: GPTQ whose target is the float model's output: it corrects the errors that its inputs already have.

Paper: Zhang et al. 2025, arXiv 2505.11695, algorithm 1: min |X_f W^T - X_q Q^T|, with the inputs X_f of the float model
    and X_q of the quantized one.
Differs: the statistic is D = sum (x_f - x_q) x_q^T in the place of G = H + D, which loses no digits where streams
    hardly differ. The Hessian is damped as in GPTQ, by a share of its mean diagonal; the paper adds 1e-6 of its largest
    eigenvalue. Ranges are clipped as in our GPTQ. With dynamic groups (`static_groups=false`) the first column has
    no rule of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Drift, Hessian, Stats
from methods.gptq import GPTQ, Problem


@dataclass(frozen=True, kw_only=True)
class Qronos(GPTQ):
    """Second-order rounding towards the outputs of the float model; the options are those of GPTQ."""

    needs: ClassVar = (Hessian, Drift)

    def _aimed(self, problem: Problem, stats: Stats) -> tuple[Tensor, Tensor]:
        W, U = problem.W[:, problem.columns], problem.U
        WD = W @ problem.solved(stats[Drift].value.to(W))
        aimed = W + WD @ U.T @ U if problem.params is None else _after_first(problem, W, WD)
        return aimed[:, problem.columns.argsort()], U


def _after_first(problem: Problem, W: Tensor, WD: Tensor) -> Tensor:
    """Steps 1 and 2 of the paper: the first column on its grid, and the columns that minimise the error then.

    W and `WD` = W D (N, K) have their columns in solving order. Algorithm 1 finds no error in the first column, and
    goes on with the others.
    """
    H, aimed = problem.solved(problem.H), W.clone()
    aimed[:, 0] = problem.rounded(W[:, 0] + WD[:, 0] / H[0, 0], int(problem.columns[0]))
    later = problem.U[1:, 1:]  # that of the Hessian without its first row and column
    aimed[:, 1:] += (WD[:, 1:] + torch.outer(W[:, 0] - aimed[:, 0], H[0, 1:])) @ later.T @ later
    return aimed
