"""W8A8 on a CPU: int8 rows times inputs quantized to 8 bits on the way in, and LLM.int8()'s decomposition.

The product is oneDNN's (`onednn.qlinear_pointwise`). Inputs are uint8 codes with zero point 128: oneDNN has that in
vector and matrix instructions, where int8 inputs fall to a reference loop on processors without AMX. LLM.int8() reads
single columns of the weight, so it keeps its rows in plain order and multiplies by `torch._int_mm`. Both products are
exact in int32; the scales of tokens and rows are applied to the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core.activation import InputQuantizer
from harness.core.qtensor import IntQTensor
from harness.kernels.base import Kernel
from harness.kernels.cpu_int8 import of_rows, signed

_MID_CODE = 128


def supports(weight: IntQTensor, inputs: InputQuantizer, dtype: torch.dtype) -> bool:
    """Whether it can be run: symmetric 8 bits on both sides, one scale a row or for all, a CPU with VNNI."""
    symmetric = all(fmt.bits == 8 and fmt.symmetric for fmt in (weight.fmt, inputs.fmt))
    known = dtype in (torch.float32, torch.bfloat16)
    return symmetric and known and weight.scale.shape[1] == 1 and torch.cpu._is_vnni_supported()


class CpuW8A8(Kernel):
    """A symmetric 8-bit IntQTensor beside the quantizer of its inputs.

    qweight  (N, K) int8 in oneDNN's own order
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
        zero = torch.zeros(1, dtype=torch.int64)  # oneDNN asks for one a row; stored once
        self.register_buffer("zero_point", zero.expand(weight.shape[0]))

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale = self.inputs.encode(inputs)
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes.view(-1, self.shape[1]),
            1.0,
            _MID_CODE,
            self.qweight,
            self.scale,
            self.zero_point,
            None,  # a bias would meet the scale of tokens
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return _scaled(found, scale, inputs, bias)


class CpuLLMInt8(Kernel):
    """A symmetric 8-bit IntQTensor for inputs whose outlier channels stay float (LLM.int8(), equation 8).

    qweight  (N, K) int8
    scale    (N,) float32
    """

    name = "cpu_llm_int8"
    quantizes_inputs = True

    qweight: Tensor
    scale: Tensor

    def __init__(self, weight: IntQTensor, inputs: InputQuantizer) -> None:
        super().__init__(weight.shape)
        self.inputs = inputs
        self.register_buffer("qweight", signed(weight))
        self.register_buffer("scale", of_rows(weight.scale.float(), weight))

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        outliers = self.inputs.outliers(inputs)
        assert outliers is not None
        codes, scale = self.inputs.encode(inputs.masked_fill(outliers, 0))
        centred = (codes.view(-1, self.shape[1]) ^ _MID_CODE).view(torch.int8)  # code - 128, in one step
        found = torch._int_mm(centred, self.qweight.t()).mul(self.scale)
        columns = outliers.view(-1, self.shape[1]).any(0).nonzero().flatten()
        found = _scaled(found, scale, inputs, bias)
        return found if not len(columns) else found.add_(self._kept(inputs * outliers, columns))

    def _kept(self, inputs: Tensor, columns: Tensor) -> Tensor:
        """The product of some columns, as floats."""
        weight = self.qweight[:, columns].float().mul_(self.scale[:, None])
        return inputs[..., columns] @ weight.to(inputs.dtype).t()


def _scaled(found: Tensor, scale: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`found` (M, N) times its tokens' scale, in the shape and dtype of a linear's output."""
    shape = (*inputs.shape[:-1], found.shape[-1])
    out = torch.mul(found.view(shape), scale, out=inputs.new_empty(shape))
    return out if bias is None else out.add_(bias)
