"""Integer codes with a scale and an offset for each group, as llama.cpp's Q4_1 and K formats have them.

weight = code * scale + offset. A float zero point, -offset / scale, would not give the same bits, and none where the
scale is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.core.formats.integer_weight import IntWeight
from harness.core.formats.packing import pack, packed_bytes
from harness.core.formats.params import Params
from harness.core.formats.qtensor import GroupedQTensor

_GROUP_BITS = 64  # a scale and an offset in float32


@dataclass(frozen=True, kw_only=True)
class OffsetWeight(IntWeight):
    """The integer grid whose parameters are a scale and, in the place of the zero point, the value of code 0."""

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        assert params.zero_point is not None
        return codes.to(params.scale.dtype).mul_(params.scale).add_(params.zero_point)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        rows, columns = self.groups(shape)
        return 8 * packed_bytes(shape[0] * shape[1], self.bits) + rows * columns * _GROUP_BITS


class OffsetQTensor(GroupedQTensor):
    """Packed codes with a scale (N, G) and an offset (N, G), both in float32."""

    fmt: OffsetWeight
    scale: Tensor
    offset: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, offset: Tensor, fmt: OffsetWeight) -> None:
        """Store `codes` (N, K) uint8."""
        super().__init__((codes.shape[0], codes.shape[1]), fmt)
        self.register_buffer("qweight", pack(codes, fmt.bits))
        self.register_buffer("scale", scale.float())
        self.register_buffer("offset", offset.float())

    def params(self) -> Params:
        return Params(self.scale, self.offset)

    def zero_points(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same weight as (code - zero_point) * scale, as near as float32 has it: codes (N, K), scale, zero point.

        In a group whose scale is 0, all codes become 0.
        """
        flat = self.scale == 0
        scale = torch.where(flat, torch.where(self.offset == 0, 1, self.offset.abs()), self.scale)
        zero_point = -self.offset / scale
        columns = flat.repeat_interleave(self.fmt.span(self.shape[1]), 1)
        return self.codes.masked_fill(columns, 0), scale, zero_point
