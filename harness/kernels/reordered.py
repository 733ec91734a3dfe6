"""A kernel for a weight whose groups use another column order (GPTQ's act_order without static groups)."""

from __future__ import annotations

from torch import Tensor

from harness.kernels.base import Kernel


class Reordered(Kernel):
    """A wrapper of another kernel: it reorders the input columns and then calls that kernel.

    order  (K,) column i of the kernel is input column order[i]
    """

    order: Tensor

    def __init__(self, kernel: Kernel, order: Tensor) -> None:
        super().__init__(kernel.shape)
        self.kernel = kernel
        self.name = kernel.name
        self.quantizes_inputs = kernel.quantizes_inputs
        self.register_buffer("order", order)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        outputs: Tensor = self.kernel(inputs[..., self.order.int()], bias)
        return outputs
