"""Weights of 2 to 8 bits with a scale for each group of inputs, and optionally a zero point: integers, NF4, FP4, E2M1.

A code of up to 5 bits selects one of 2^bits levels, so that integer grids and tables differ in the levels alone; wider
codes are integers. Inputs are float32 or bfloat16 and are not rounded; sums are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

from harness.core import FloatQTensor, IntQTensor, LevelsQTensor, QTensor
from harness.kernels.native import library
from harness.kernels.native.panel_kernel import PanelKernel, Tensors
from harness.kernels.native.panels import HALF, pack_groups, pack_panels

_TABLE_BITS = 5  # the widest code whose levels fit into registers
_TABLE = 32  # entries of `levels`: a table of fewer repeats


def supports(weight: QTensor, dtype: torch.dtype) -> TypeGuard[IntQTensor | FloatQTensor | LevelsQTensor]:
    """Whether the kernel runs this weight: inputs in float32 or bfloat16, groups of 16, 32, 48, ... or whole rows."""
    if not isinstance(weight, IntQTensor | FloatQTensor | LevelsQTensor):
        return False
    columns, groups, fmt = weight.shape[1], weight.scale.shape[1], weight.fmt
    if isinstance(weight, LevelsQTensor) and weight.fmt.spans_rows(weight.shape):
        return False
    in_order = groups == 1 or columns // groups % HALF == 0
    return in_order and (isinstance(weight, IntQTensor) or fmt.bits <= _TABLE_BITS) and library.runs(dtype)


def build(weight: IntQTensor | FloatQTensor | LevelsQTensor) -> GroupedLinear:
    """The kernel of a weight that is supported."""
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


def _of_floats(weight: FloatQTensor) -> GroupedLinear:
    """Elements as levels, with the scale of the whole tensor; scales of 8 bits are exact in bfloat16."""
    fmt, levels = weight.fmt, weight.fmt.kind.levels
    if weight.tensor_scale is not None:
        levels = levels * weight.tensor_scale.cpu()
    scale = weight.scale if weight.scale.dtype == torch.float32 else weight.scale.to(torch.bfloat16)
    return GroupedLinear.of(f"native_{fmt.element}", Codes(weight.codes, fmt.bits, levels), scale, None)


@dataclass(frozen=True)
class Codes:
    """Codes (N, K) of `bits` bits that select from `levels` (2^bits,); otherwise signed integers of 6 or 8 bits."""

    values: Tensor
    bits: int
    levels: Tensor | None

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

    def __init__(self, name: str, shape: tuple[int, int], tensors: Tensors, levels: Tensor) -> None:
        super().__init__(name, shape, tensors)
        self.register_buffer("levels", levels)

    @classmethod
    def of(cls, name: str, codes: Codes, scale: Tensor, zero_point: Tensor | None) -> Self:
        """The kernel of a weight; `scale` and `zero_point` are (N, G), or (1, 1)."""
        rows, columns = codes.values.shape
        tensors = {
            "qweight": pack_panels(codes.values, codes.bits),
            "scale": pack_groups(scale, rows),
            "zero_point": None if zero_point is None else pack_groups(zero_point, rows),
        }
        return cls(name, (rows, columns), tensors, codes.table())

    @property
    def settings(self) -> tuple[Any, ...]:
        return tuple(self.levels.tolist())

    def of_rows(self, rows: int, tensors: Tensors) -> GroupedLinear:
        return GroupedLinear(self.name, (rows, self.shape[1]), tensors, self.levels)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        stored = self._buffers  # `self.qweight` would search all attributes first
        outputs: Tensor = torch.ops.ptqbench_native.grouped_linear.default(
            inputs, stored["qweight"], stored["levels"], stored["scale"], stored["zero_point"], bias, self.shape[0]
        )
        return outputs
