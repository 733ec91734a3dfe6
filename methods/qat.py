"""QAT: quantization-aware training: after any method, trains all weights, rounded in each step, with their scales.

Paper: Jacob et al. 2018, arXiv 1712.05877, section 3 (training with rounded weights); Bengio et al. 2013, arXiv
    1308.3432, section 4 (straight-through); Esser et al. 2020, arXiv 1902.08153, equation 3 (scales); Liu et al. 2023,
    arXiv 2305.17888 (LLM-QAT: the float model as the teacher).
Differs: trains on the calibration text for a few hundred steps, where the papers generate or read millions of tokens.
    The weights start from the codes of the step before, or from rounding to nearest. Held-out sequences decide which
    epoch is kept.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from harness.core import Distillation
from methods.distill import Distill


@dataclass(frozen=True, kw_only=True)
class QAT(Distill):
    """The last step of a composite, or alone; the options are those of Distill."""

    epochs: int = 12
    lr: float = 0.002
    batch: int = 1

    @property
    def distillation(self) -> Distillation:
        return dataclasses.replace(super().distillation, weights=True)
