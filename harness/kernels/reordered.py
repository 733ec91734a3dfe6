"""A kernel for a weight whose groups are of input columns in another order (GPTQ's act_order, no static groups)."""

from __future__ import annotations

from torch import Tensor

from harness.kernels.base import Kernel


class Reordered(Kernel):
    """Another kernel's weight, for inputs whose columns have to be brought into its order first.

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
        found: Tensor = self.kernel(inputs[..., self.order.int()], bias)
        return found
