"""W8A8 on a CPU: int8 weights times inputs that are quantized to 8 bits at each call, and LLM.int8()'s decomposition.

Large weights use oneDNN's product (`onednn.qlinear_pointwise`) and its packed order. Its inputs are uint8 codes with
zero point 128: oneDNN has vector and matrix instructions for them, while int8 inputs run in a reference loop on
processors without AMX. A call has an overhead of about 40 us, so small weights stay in plain order for `torch._int_mm`.
The weights of LLM.int8() do too, because single columns are read. Both products are exact; scales are applied to the
result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import IntQTensor
from harness.core.formats import InputQuantizer
from harness.kernels.base import Kernel
from harness.kernels.cpu_int8 import of_rows, signed

MAX_PLAIN_WEIGHTS = 1 << 21  # N K up to which `torch._int_mm` is faster for one row of x
_MID_CODE = 128


def supports(weight: IntQTensor, inputs: InputQuantizer, dtype: torch.dtype) -> bool:
    """Whether a kernel runs this: symmetric 8 bits for both operands, one scale per row or tensor, a CPU with VNNI."""
    symmetric = all(fmt is not None and fmt.bits == 8 and fmt.symmetric for fmt in (weight.fmt, inputs.integers))
    supported_dtype = dtype in (torch.float32, torch.bfloat16)
    return symmetric and supported_dtype and weight.scale.shape[1] == 1 and torch.cpu._is_vnni_supported()


def build(weight: IntQTensor, inputs: InputQuantizer) -> Kernel:
    """The kernel for a supported weight; its size and the outlier threshold of the inputs decide which one."""
    if inputs.fmt.threshold is not None:
        return CpuLLMInt8(weight, inputs)
    rows, columns = weight.shape
    return (CpuW8A8Plain if rows * columns <= MAX_PLAIN_WEIGHTS else CpuW8A8)(weight, inputs)


class CpuW8A8(Kernel):
    """A symmetric 8-bit IntQTensor, packed for oneDNN, and the quantizer of its inputs.

    qweight  (N, K) int8 in oneDNN's order
    scale    (N,) float32
    """

    name = "cpu_w8a8"
    quantizes_inputs = True

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: IntQTensor, inputs: InputQuantizer) -> None:
        super().__init__(weight.shape)
        self.inputs = inputs
        self.register_buffer("qweight", torch.ops.onednn.qlinear_prepack(signed(weight), None))
        self.register_buffer("scale", of_rows(weight.scale.float(), weight))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int64))

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale = self.inputs.encode(inputs)
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes.view(-1, self.shape[1]).view(torch.uint8).bitwise_xor_(_MID_CODE),  # code + 128, in place
            1.0,
            _MID_CODE,
            self.qweight,
            self.scale,
            self.zero_point,
            None,  # no bias: the scale of the tokens would multiply it
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return _scaled(products, scale, inputs, bias)


class CpuW8A8Plain(Kernel):
    """A small symmetric 8-bit IntQTensor in plain order, and the quantizer of its inputs.

    qweight  (N, K) int8
    scale    (N,) float32
    """

    name = "cpu_w8a8"
    quantizes_inputs = True

    qweight: Tensor
    scale: Tensor

    def __init__(self, weight: IntQTensor, inputs: InputQuantizer) -> None:
        super().__init__(weight.shape)
        self.inputs = inputs
        self.register_buffer("qweight", signed(weight))
        self.register_buffer("scale", of_rows(weight.scale.float(), weight))

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale = self.inputs.encode(inputs)
        products = torch._int_mm(codes.view(-1, self.shape[1]), self.qweight.t()).mul(self.scale)
        return _scaled(products, scale, inputs, bias)


class CpuLLMInt8(CpuW8A8Plain):
    """The same kernel for inputs whose outlier channels stay float (LLM.int8(), equation 8)."""

    name = "cpu_llm_int8"

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        outliers = self.inputs.outliers(inputs)
        assert outliers is not None
        columns = outliers.view(-1, self.shape[1]).any(0).nonzero().flatten()
        if not len(columns):
            return super().forward(inputs, bias)
        weight = self.qweight[:, columns].float().mul_(self.scale[:, None]).to(inputs.dtype)
        outlier_products = (inputs[..., columns] * outliers[..., columns]) @ weight.t()
        return outlier_products.add_(super().forward(inputs.masked_fill(outliers, 0), bias))


def _scaled(products: Tensor, scale: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`products` (M, N) times the scale of their tokens, plus the bias, in the shape and dtype of the output."""
    shape = (*inputs.shape[:-1], products.shape[-1])
    out = torch.mul(products.view(shape), scale, out=inputs.new_empty(shape))
    return out if bias is None else out.add_(bias)
