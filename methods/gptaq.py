"""GPTAQ: GPTQ in which each column also corrects the errors that its inputs already have.

Paper: Li et al. 2025, arXiv 2504.02692, algorithm 1; the authors' code (Intelligent-Computing-Lab-Yale/GPTAQ) has the
    factor `alpha`, which the paper has not.
Differs: a column's correction is linear in its updated weight, so that the loop over columns is that of GPTQ, with
    another weight and factor: with P the paper's matrix, updated weights w and errors e,
    w = W - e triu(U, 1) + w P  gives  w = W S - e triu(U, 1) S,  S = (I - P)^-1.
    Ranges are clipped as in our GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Drift, Hessian, Stats, above_zero
from methods.gptq import GPTQ


@dataclass(frozen=True, kw_only=True)
class GPTAQ(GPTQ):
    """Second-order rounding with asymmetric calibration; the other options are those of GPTQ.

    alpha  share of the correction
    """

    needs: ClassVar = (Hessian, Drift)

    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "alpha")

    def _start(
        self, W: Tensor, U: Tensor, stats: Stats, order: Tensor, permuted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        channels = order if permuted is None else permuted[order]
        D = stats[Drift].value.to(U)[channels][:, channels]
        P = self.alpha * (D @ U.T).triu(1) @ U
        eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
        S = torch.linalg.solve_triangular(eye - P, eye, upper=True, unitriangular=True)
        factor = U.triu(1) @ S + U.diagonal().diag()
        return (W[:, order] @ S)[:, order.argsort()], factor
