"""W8A16 on a CPU: torch's int8 kernel for few rows, a bfloat16 matmul of the cast codes for many.

The kernel is `aten._weight_int8pack_mm`, which uses no matrix instructions. Above `MAX_DIRECT_ROWS` rows, the codes are
cast to bfloat16, where they are exact, and multiplied; the scale is applied to the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import IntQTensor
from harness.kernels.base import Kernel

MAX_DIRECT_ROWS = 8  # up to this number of rows of x the kernel is faster, by `python -m harness.kernels.bench`
_COLUMNS = 16  # must divide K; otherwise the kernel reads past the end, as of torch 2.13
_MID_CODE = 128


def supports(weight: IntQTensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can run this weight: 8 bits, one scale per row or tensor, K a multiple of 16, bfloat16."""
    fits = weight.fmt.bits == 8 and weight.scale.shape[1] == 1 and weight.shape[1] % _COLUMNS == 0
    return fits and dtype == torch.bfloat16


class CpuInt8(Kernel):
    """An 8-bit IntQTensor for inputs in bfloat16.

    qweight  (N, K) int8, code - 128
    scale    (N,) bfloat16
    shift    (N,) bfloat16, (128 - zero_point) * scale, multiplied by the sum of a token's inputs; None if symmetric
    """

    name = "cpu_w8a16"

    qweight: Tensor
    scale: Tensor
    shift: Tensor | None

    def __init__(self, weight: IntQTensor) -> None:
        super().__init__(weight.shape)
        scale = weight.scale.float()
        shift = None if weight.fmt.symmetric else of_rows((_MID_CODE - weight.zero_points()) * scale, weight)
        self.register_buffer("qweight", signed(weight))
        self.register_buffer("scale", of_rows(scale, weight).to(torch.bfloat16))
        self.register_buffer("shift", shift if shift is None else shift.to(torch.bfloat16))

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        flat = inputs.reshape(-1, self.shape[1])
        outputs: Tensor
        if flat.shape[0] <= MAX_DIRECT_ROWS:
            outputs = torch.ops.aten._weight_int8pack_mm(flat, self.qweight, self.scale)
        else:
            outputs = F.linear(flat, self.qweight.to(flat.dtype)).mul_(self.scale)
        if self.shift is not None:
            outputs = outputs.addr_(flat.sum(-1), self.shift)
        outputs = outputs if bias is None else outputs + bias
        return outputs.view(*inputs.shape[:-1], self.shape[0])


def signed(weight: IntQTensor) -> Tensor:
    """8-bit codes (N, K) as int8: code - 128."""
    return (weight.codes ^ _MID_CODE).view(torch.int8)


def of_rows(values: Tensor, weight: IntQTensor) -> Tensor:
    """One value per row, (N,), from (N, 1) or (1, 1)."""
    return values.expand(weight.shape[0], 1)[:, 0].contiguous()
