"""Weights of 2 to 8 bits with a scale for each group of inputs, and optionally a zero point: integers, tables, floats.

A code of up to 5 bits selects one of 2^bits levels, so that integer grids, NF4, FP4 and E2M1 differ in the levels
alone. Wider codes are integers or floats, FP6 and FP8. Inputs are float32 or bfloat16 and are not rounded; sums are in
float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

from harness.core import FloatQTensor, IntQTensor, LevelsQTensor, QTensor
from harness.core.formats import OffsetQTensor, Params
from harness.kernels.native import library
from harness.kernels.native.panel_kernel import PanelKernel, Tensors
from harness.kernels.native.panels import HALF, in_pairs, pack_groups, pack_panels

_TABLE_BITS = 5  # the widest code whose levels fit into registers
_TABLE = 32  # entries of `levels`: a table of fewer repeats
_ELEMENTS = ("e2m3", "e3m2", "e4m3", "e5m2")  # floats wider than a table
_HALF_BIAS = 15  # of float16


Supported = IntQTensor | OffsetQTensor | FloatQTensor | LevelsQTensor


def supports(weight: QTensor, dtype: torch.dtype) -> TypeGuard[Supported]:
    """Whether the kernel runs this weight: inputs in float32 or bfloat16, groups of 16, 32, 48, ... or whole rows."""
    if not library.runs(dtype):
        return False
    if isinstance(weight, FloatQTensor):
        return _floats_fit(weight)
    if isinstance(weight, LevelsQTensor):
        by_rows = weight.fmt.bits <= _TABLE_BITS and not weight.fmt.spans_rows(weight.shape)
        return by_rows and _in_halves(weight.shape[1], weight.scale.shape[1])
    return isinstance(weight, IntQTensor | OffsetQTensor) and _in_halves(weight.shape[1], weight.scale.shape[1])


def _in_halves(columns: int, groups: int) -> bool:
    """Whether groups of inputs consist of whole half blocks."""
    return groups == 1 or columns // groups % HALF == 0


def _floats_fit(weight: FloatQTensor) -> bool:
    size = _group(weight)
    fits = (size == weight.shape[1] or size % HALF == 0) and bool(_scale(weight).isfinite().all())
    return fits and (weight.fmt.bits <= _TABLE_BITS or weight.fmt.element in _ELEMENTS)


def build(weight: Supported) -> GroupedLinear:
    """The kernel of a weight that is supported."""
    if isinstance(weight, OffsetQTensor):
        return _of_offsets(weight)
    if isinstance(weight, IntQTensor):
        return _of_integers(weight)
    if isinstance(weight, FloatQTensor):
        return _of_floats(weight)
    codes = Codes(weight.codes, weight.fmt.bits, weight.levels)
    return GroupedLinear.of("native_levels", codes, weight.scales(), None)


def _of_integers(weight: IntQTensor) -> GroupedLinear:
    """An integer grid; codes and zero points are moved so that 0 is in the middle, which keeps sums small."""
    fmt, scale = weight.fmt, weight.scale
    bits = 8 if fmt.bits == 7 else fmt.bits
    table, float_zero = bits <= _TABLE_BITS, not fmt.symmetric and fmt.zero_point == "float"
    middle = 0 if table and float_zero else fmt.mid_code  # a float zero point is not exact after a move
    levels = torch.arange(1 << bits, dtype=torch.float32) - middle if table else None
    codes = Codes(weight.codes if table else weight.codes.int() - middle, bits, levels)
    if float_zero and not table:
        scale = scale.float()
    zero_point = None if fmt.symmetric else (weight.zero_points() - middle).to(scale.dtype)
    return GroupedLinear.of(f"native_int{fmt.bits}", codes, scale, zero_point)


def _of_offsets(weight: OffsetQTensor) -> GroupedLinear:
    """Integer codes with the zero points that their offsets are nearest to."""
    bits = weight.fmt.bits
    codes, scale, zero_point = weight.zero_points()
    levels = torch.arange(1 << bits, dtype=torch.float32)
    return GroupedLinear.of(f"native_int{bits}", Codes(codes, bits, levels), scale, zero_point)


def _of_floats(weight: FloatQTensor) -> GroupedLinear:
    """Elements as levels, which the scale of the whole tensor multiplies, or as floats."""
    fmt, levels = weight.fmt, weight.fmt.kind.levels
    if weight.tensor_scale is not None:
        levels = levels * weight.tensor_scale.cpu()
    table = fmt.bits <= _TABLE_BITS
    codes = Codes(weight.codes, fmt.bits, levels if table else None, 0 if table else fmt.kind.exponent)
    span, size = fmt.span(weight.shape[1]), _group(weight)
    by_row = fmt.by_row(Params(_scale(weight)), torch.arange(weight.shape[0], device=weight.scale.device)).scale
    scale = by_row.repeat_interleave(span // size, 1)[:, : weight.shape[1] // size]
    return GroupedLinear.of(f"native_{fmt.element}", codes, scale, None)


def _group(weight: FloatQTensor) -> int:
    """Inputs that share a scale in the kernel: where the last block of a row is cut, a part of a block."""
    columns = weight.shape[1]
    return math.gcd(min(weight.fmt.span(columns), columns), columns)


def _scale(weight: FloatQTensor) -> Tensor:
    """The scales in float32, or in bfloat16 where they are exact.

    Elements that are floats in the kernel are read with the bias of float16, and the scales make up for it; they also
    have the scale of the whole tensor.
    """
    scale = weight.scale if weight.scale.dtype == torch.float32 else weight.scale.to(torch.bfloat16)
    if weight.fmt.bits <= _TABLE_BITS:
        return scale
    unit = 2.0 ** (_HALF_BIAS - weight.fmt.kind.bias)
    return scale * unit if weight.tensor_scale is None else scale.float() * weight.tensor_scale * unit


@dataclass(frozen=True)
class Codes:
    """Codes (N, K) of `bits` bits that select from `levels` (2^bits,); of 6 or 8 bits, signed integers or floats.

    exponent  bits of exponent of floats; otherwise 0
    """

    values: Tensor
    bits: int
    levels: Tensor | None
    exponent: int = 0

    def packed(self) -> Tensor:
        """The codes in panels, (panels, blocks, bits, 16) int32."""
        panels = pack_panels(self.values, self.bits)
        return in_pairs(panels) if self.exponent else panels

    def table(self) -> Tensor:
        """The levels, repeated (32,), so that bits above a code do not matter; zeros if there are none."""
        return torch.zeros(_TABLE) if self.levels is None else self.levels.float().repeat(_TABLE // len(self.levels))


class GroupedLinear(PanelKernel):
    """One weight (N, K) in panels of 16 rows, see `harness.kernels.native.panels`.

    qweight     (panels, blocks, bits, 16) int32
    scale       (panels, G, 16)
    zero_point  likewise, in units of levels; None if there is none
    levels      (32,) float32, the value of each code, if it has at most 5 bits
    """

    qweight: Tensor
    levels: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, name: str, shape: tuple[int, int], tensors: Tensors, levels: Tensor, exponent: int) -> None:
        super().__init__(name, shape, tensors)
        self.register_buffer("levels", levels)
        self._exponent = exponent

    @classmethod
    def of(cls, name: str, codes: Codes, scale: Tensor, zero_point: Tensor | None) -> Self:
        """The kernel of a weight; `scale` and `zero_point` are (N, G), or (1, 1)."""
        rows, columns = codes.values.shape
        tensors = {
            "qweight": codes.packed(),
            "scale": pack_groups(scale, rows),
            "zero_point": None if zero_point is None else pack_groups(zero_point, rows),
        }
        return cls(name, (rows, columns), tensors, codes.table(), codes.exponent)

    @property
    def settings(self) -> tuple[Any, ...]:
        return *self.levels.tolist(), self._exponent

    def of_rows(self, rows: int, tensors: Tensors) -> GroupedLinear:
        return GroupedLinear(self.name, (rows, self.shape[1]), tensors, self.levels, self._exponent)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        stored = self._buffers  # `self.qweight` would search all attributes first
        outputs: Tensor = torch.ops.ptqbench_native.grouped_linear.default(
            inputs,
            stored["qweight"],
            stored["levels"],
            stored["scale"],
            stored["zero_point"],
            bias,
            self._exponent,
            self.shape[0],
        )
        return outputs
