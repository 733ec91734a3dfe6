"""Linears whose inputs are quantized to at most 8 bits at each call, in integers: W8A8, W4A8, W4A4, and LLM.int8().

Quantization of the inputs, product, scales and bias are one operator. Codes of weights have no sign, those of inputs
do, and their products are summed exactly. Outlier channels of LLM.int8() are multiplied in float32 (equation 8).
"""

from __future__ import annotations

from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

from harness.core import IntQTensor, QTensor
from harness.core.formats import InputQuantizer
from harness.kernels.native import library
from harness.kernels.native.panel_kernel import PanelKernel, Tensors
from harness.kernels.native.panels import PANEL, pack_groups, pack_panels

_WIDTHS = (2, 4, 8)  # bits of a stored code


def supports(weight: QTensor, inputs: InputQuantizer, dtype: torch.dtype) -> TypeGuard[IntQTensor]:
    """Whether the kernel runs this: a scale per row or tensor, integer zero points, inputs on a symmetric grid."""
    if not isinstance(weight, IntQTensor) or inputs.integers is None or not library.runs(dtype):
        return False
    integers = weight.fmt.symmetric or weight.fmt.zero_point == "integer"
    return integers and weight.scale.shape[1] == 1 and inputs.integers.symmetric


class Int8Linear(PanelKernel):
    """One weight (N, K) in panels of 16 rows, see `harness.kernels.native.panels`, and the quantizer of its inputs.

    qweight     (panels, blocks, bits, 16) int32, codes of 2, 4 or 8 bits
    scale       (panels, 16) float32
    zero_point  (panels, 16) int32
    """

    quantizes_inputs = True

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, name: str, shape: tuple[int, int], tensors: Tensors, inputs: InputQuantizer) -> None:
        super().__init__(name, shape, tensors)
        self.inputs, fmt = inputs, inputs.integers
        assert fmt is not None
        self._format = (
            fmt.clip if fmt.dynamic else 1.0,  # a calibrated scale is clipped already
            float(fmt.steps),
            -fmt.mid_code,
            fmt.mid_code - 1,
            fmt.threshold or 0.0,
            fmt.granularity == "tensor",
            shape[0],
        )

    @classmethod
    def of(cls, weight: IntQTensor, inputs: InputQuantizer) -> Self:
        """The kernel of a weight that is supported."""
        bits, fmt = weight.fmt.bits, inputs.fmt
        tensors = {
            "qweight": pack_panels(weight.codes, next(width for width in _WIDTHS if width >= bits)),
            "scale": _by_panels(weight.scale.float(), weight),
            "zero_point": _by_panels(weight.zero_points().int(), weight),
        }
        name = "native_llm_int8" if fmt.threshold is not None else f"native_w{bits}a{fmt.bits}"
        return cls(name, weight.shape, tensors, inputs)

    @property
    def settings(self) -> tuple[Any, ...]:
        fixed = () if self.inputs.fmt.dynamic else self.inputs.scale.flatten().tolist()
        return self.inputs.fmt, *fixed

    def of_rows(self, rows: int, tensors: Tensors) -> Int8Linear:
        return Int8Linear(self.name, (rows, self.shape[1]), tensors, self.inputs)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        stored = self._buffers  # `self.qweight` would search all attributes first
        fixed = None if self.inputs.fmt.dynamic else self.inputs.scale
        outputs: Tensor = torch.ops.ptqbench_native.int8_linear.default(
            inputs, stored["qweight"], stored["scale"], stored["zero_point"], bias, fixed, *self._format
        )
        return outputs


def _by_panels(values: Tensor, weight: IntQTensor) -> Tensor:
    return pack_groups(values, weight.shape[0]).view(-1, PANEL)
