"""The interface of a kernel: one weight, packed in the order in which its matmul reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Kernel(nn.Module, ABC):
    """One weight (N out, K in), packed in the order of this kernel. All stored tensors are buffers of the module.

    name              the kernel's name in the record
    shape             (N, K)
    quantizes_inputs  whether the kernel also quantizes its inputs; the caller then must not do it
    """

    name: str
    quantizes_inputs: bool = False

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Compute y = x W^T + b for inputs x (..., K), in the dtype of x."""


class JoinableKernel(Kernel):
    """A kernel of which several can store their weights as one, so that linears that read one input are one call."""

    @classmethod
    @abstractmethod
    def joined(cls, kernels: Sequence[Kernel]) -> Kernel | None:
        """One kernel with the rows of all `kernels`, which then hold views of its tensors; None if they do not fit."""
