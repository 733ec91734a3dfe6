"""What a kernel is: one packed weight in the order in which its matmul reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Kernel(nn.Module, ABC):
    """One weight (N out, K in) in a kernel's own order. All that it keeps is a buffer of this module.

    name              what the record calls the kernel
    shape             (N, K)
    quantizes_inputs  whether it quantizes its inputs too, so that nobody else must
    """

    name: str
    quantizes_inputs: bool = False

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """y = x W^T + b of inputs (..., K), in their dtype."""
