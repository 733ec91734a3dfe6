"""A linear with a Hadamard transform of its input at run time; its weight holds the inverse transform."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from harness.core import hadamard


class Rotated(nn.Module):
    """y = linear(x Q) with Q of `harness.core.hadamard`; replaces a linear of the model.

    The inner linear, named `NAME.linear`, is an ordinary linear that reads the rotated input, so it is observed,
    quantized and packed like any other. Nothing is stored for Q.
    """

    INNER: ClassVar[str] = "linear"

    def __init__(self, linear: nn.Module, size: int | None = None) -> None:
        """With `size`, Q is block diagonal: each `size` consecutive inputs are rotated alone."""
        super().__init__()
        self.linear, self.size = linear, size

    def forward(self, inputs: Tensor) -> Tensor:
        """Output (..., N) of inputs (..., K)."""
        outputs: Tensor = self.linear(hadamard.rotate(inputs, self.size))
        return outputs
