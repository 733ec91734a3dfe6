"""SpinQuant: a rotation of the residual stream that is learned for rounded inputs.

Paper: Liu et al. 2024, arXiv 2405.16406, section 3: R1 is trained on the Stiefel manifold by Cayley SGD, for the loss
    of the network with rounded inputs and float weights; Hadamard transforms at run time are those of QuaRot.
Differs: the loss is the KL from the float model's distribution, the paper has the cross-entropy with the text;
    held-out sequences decide which epoch is kept. R1 starts as QuaRot's random Hadamard matrix and is multiplied by
    what is learned. R2, which turns values and output projections within heads, is not learned: their inputs are
    rotated as a whole at run time. Queries and keys are not rotated. Gradients pass rounding with the ranges of the
    inputs as they are; the paper's also pass through the ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.core import Rotation, Scheme, above_zero, at_least
from methods.rotate import Rotate


@dataclass(frozen=True, kw_only=True)
class SpinQuant(Rotate):
    """Learned rotation; `seed`, `kind` and `online` are those of Rotate.

    epochs    passes over the calibration data
    lr        largest first step
    batch     sequences of a step
    bfloat16  compute products in bfloat16
    """

    epochs: int = 8
    lr: float = 1.5
    batch: int = 2
    bfloat16: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "batch")
        above_zero(self, "lr")

    def check(self, scheme: Scheme) -> None:
        if scheme.activation is None or not scheme.activation.dynamic:
            raise ValueError(
                f"scheme={scheme.name} does not round inputs with ranges of their own, for which the rotation is "
                "learned; use rotate, or a scheme such as scheme=w4a4_token"
            )
        super().check(scheme)

    @property
    def rotation(self) -> Rotation:
        return Rotation(epochs=self.epochs, lr=self.lr, batch=self.batch, bfloat16=self.bfloat16)
