"""Linears whose inputs are quantized to at most 8 bits at each call, in integers: W8A8, W4A8, W4A4, and LLM.int8().

Quantization of the inputs, product, scales and bias are one operator. Codes of weights have no sign, those of inputs
do, and their products are summed exactly. Outlier channels of LLM.int8() are multiplied in float32 (equation 8).
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from harness.core import IntQTensor, QTensor
from harness.core.formats import InputQuantizer, grid
from harness.kernels.base import Kernel
from harness.kernels.native import library
from harness.kernels.native.panels import PANEL, pack_groups, pack_panels

_WIDTHS = (2, 4, 8)  # bits of a stored code


def supports(weight: QTensor, inputs: InputQuantizer, dtype: torch.dtype) -> TypeGuard[IntQTensor]:
    """Whether the kernel runs this: a scale per row or tensor, integer zero points, inputs on a symmetric grid."""
    if not isinstance(weight, IntQTensor) or not library.runs(dtype):
        return False
    integers = weight.fmt.symmetric or weight.fmt.zero_point == "integer"
    return integers and weight.scale.shape[1] == 1 and inputs.fmt.symmetric


class Int8Linear(Kernel):
    """One weight (N, K) in panels of 16 rows, see `harness.kernels.native.panels`, and the quantizer of its inputs.

    qweight     (panels, blocks, bits, 16) int32, codes of 2, 4 or 8 bits
    scale       (panels, 16) float32
    zero_point  (panels, 16) int32
    """

    quantizes_inputs = True

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight: IntQTensor, inputs: InputQuantizer) -> None:
        super().__init__(weight.shape)
        bits, fmt = weight.fmt.bits, inputs.fmt
        self.name = "native_llm_int8" if fmt.threshold is not None else f"native_w{bits}a{fmt.bits}"
        self.inputs = inputs
        self.register_buffer("qweight", pack_panels(weight.codes, next(width for width in _WIDTHS if width >= bits)))
        self.register_buffer("scale", _by_panels(weight.scale.float(), weight))
        self.register_buffer("zero_point", _by_panels(weight.zero_points().int(), weight))
        self._format = (
            fmt.clip if fmt.dynamic else 1.0,  # a calibrated scale is clipped already
            float(grid.symmetric_steps(fmt)),
            -fmt.mid_code,
            fmt.mid_code - 1,
            fmt.threshold or 0.0,
            fmt.granularity == "tensor",
            weight.shape[0],
        )

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        stored = self._buffers  # `self.qweight` would search all attributes first
        fixed = None if self.inputs.fmt.dynamic else self.inputs.scale
        outputs: Tensor = torch.ops.ptqbench_native.int8_linear.default(
            inputs, stored["qweight"], stored["scale"], stored["zero_point"], bias, fixed, *self._format
        )
        return outputs


def _by_panels(values: Tensor, weight: IntQTensor) -> Tensor:
    return pack_groups(values, weight.shape[0]).view(-1, PANEL)
