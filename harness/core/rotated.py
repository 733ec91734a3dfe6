"""A linear whose input is turned by a Hadamard transform at run time; its weight is turned the other way."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from harness.core import hadamard


class Rotated(nn.Module):
    """y = linear(x Q) with Q of `harness.core.hadamard`, in the place of a linear of the model.

    What reads the turned input is an ordinary linear under the name `NAME.linear`, so that it is observed, quantized
    and packed like any other. Nothing is stored for Q.
    """

    INNER: ClassVar[str] = "linear"

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs: Tensor) -> Tensor:
        """Output (..., N) of inputs (..., K)."""
        found: Tensor = self.linear(hadamard.rotate(inputs))
        return found
