"""Qronos: GPTQ whose target is the float model's output: it corrects the errors that its inputs already have.

Paper: Zhang et al. 2025, arXiv 2505.11695, algorithm 1: min |X_f W^T - X_q Q^T|, with the inputs X_f of the float model
    and X_q of the quantized one.
Differs: with G = sum x_f x_q^T and the damped Hessian H, the outputs of W G H^-1 are nearest to those of the float
    model, and algorithm 1 of GPTQ rounds this weight. That is the paper's algorithm but for the first column, which it
    rounds before it corrects the others. Ranges are those of the corrected weight, and are clipped as in our GPTQ. The
    correction has a damping of its own: with that of GPTQ, it follows the calibration tokens too closely and loses to
    GPTQ. The statistic is D = G - H, which loses no digits where the two streams hardly differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Drift, Hessian, Stats, above_zero
from methods.gptq import GPTQ


@dataclass(frozen=True, kw_only=True)
class Qronos(GPTQ):
    """Second-order rounding towards the outputs of the float model; the other options are those of GPTQ.

    correction_damp  added to the Hessian's diagonal where the weight is corrected, as a share of the diagonal's mean
    """

    needs: ClassVar = (Hessian, Drift)

    damp: float = 0.05
    correction_damp: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(self, "correction_damp")

    def _target(self, W: Tensor, H: Tensor, stats: Stats, permuted: Tensor | None) -> Tensor:
        def correction() -> Tensor:
            """D H^-1 (K, K)."""
            D = stats[Drift].value.to(H)
            D = D if permuted is None else D[permuted][:, permuted]
            damped = H + self.correction_damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
            corrected: Tensor = torch.linalg.solve(damped, D.T).T
            return corrected

        shared: Tensor = stats.shared((Qronos, self.correction_damp, W.dtype), correction)
        return W + W @ shared
