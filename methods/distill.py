"""Distill: after any method, trains scales, zero points, codebooks and norms end to end towards the float model.

Paper: EfficientQAT, Chen et al. 2024, arXiv 2407.11062, section 3.3 (E2E-QP: step sizes alone, codes fixed).
Differs: the loss is the KL from the float model's distribution, as in mlx-lm's DWQ, in the place of the cross-entropy
    with the text; floats of codebook formats, and norms, are trained too; held-out sequences decide which epoch is
    kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.core import Distillation, Method, Scheme, above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """The last step of a composite.

    epochs    passes over the calibration data
    lr        first step of Adam, as a share of the root mean square of the trained tensor
    batch     sequences of a step
    bfloat16  compute products in bfloat16; what is trained stays float32
    """

    epochs: int = 10
    lr: float = 0.003
    batch: int = 4
    bfloat16: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "batch")
        above_zero(self, "lr")

    def check(self, scheme: Scheme) -> None:
        """Every scheme is served; the step before chooses the codes."""

    @property
    def distillation(self) -> Distillation:
        return Distillation(epochs=self.epochs, lr=self.lr, batch=self.batch, bfloat16=self.bfloat16)
