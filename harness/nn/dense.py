"""DenseLinear, a float linear that decodes as fast as its weight can be read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.kernels.native import library


class DenseLinear(nn.Linear):
    """A float linear in the native kernels: few rows of inputs are multiplied at the speed of memory, more by torch.

    Its results differ from those of nn.Linear by the rounding of sums in float32, and only for few rows. At one token,
    torch's product reads a weight at less than half of that speed on some processors, and the head of a small model is
    its largest weight: beside quantized linears, most of the time would be spent there.
    """

    kernel = "native_dense"

    @classmethod
    def of(cls, linear: nn.Linear) -> DenseLinear:
        """A linear with the parameters of `linear`, which both share."""
        with torch.device("meta"):
            dense = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        dense.weight, dense.bias = linear.weight, linear.bias
        return dense.train(linear.training)

    @staticmethod
    def supports(linear: nn.Module) -> bool:
        """Whether the kernel runs this module: a linear of torch in float32 or bfloat16 on a CPU."""
        if type(linear) is not nn.Linear or not library.runs(linear.weight.dtype):
            return False
        return linear.weight.device.type == "cpu" and linear.weight.is_contiguous()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.ptqbench_native.dense_linear.default(inputs, self.weight, self.bias)
        return outputs
