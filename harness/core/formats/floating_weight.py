"""Weights in small floats: the format, and the stored tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats.floating import FloatFormat
from harness.core.formats.format import WeightFormat
from harness.core.formats.packing import pack, packed_bytes
from harness.core.formats.params import Params
from harness.core.formats.qtensor import GroupedQTensor, Tuner
from harness.core.formats.scale_tuner import scale_tuner


@dataclass(frozen=True, kw_only=True)
class FloatWeight(WeightFormat, FloatFormat):
    """Small floats of one weight (N out, K in).

    granularity  also block: a square of `group_size` output rows and as many inputs; squares at the end may be cut
    """

    granularity: Literal["tensor", "channel", "group", "block"] = "channel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "block" and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} with granularity=block; expected a positive number")

    def groups(self, shape: tuple[int, int]) -> tuple[int, int]:
        if self.granularity != "block":
            return super().groups(shape)
        rows, columns = (-(-size // self.group_size) for size in shape)
        return rows, columns

    def to_groups(self, weight: Tensor) -> Tensor:
        if self.granularity != "block":
            return super().to_groups(weight)
        size, (rows, columns) = self.group_size, self.groups((weight.shape[0], weight.shape[1]))
        padded = F.pad(weight, (0, columns * size - weight.shape[1], 0, rows * size - weight.shape[0]))
        return padded.view(rows, size, columns, size).transpose(1, 2).reshape(rows, columns, -1)

    def from_groups(self, groups: Tensor, shape: tuple[int, int]) -> Tensor:
        if self.granularity != "block":
            return super().from_groups(groups, shape)
        rows, columns, size = *groups.shape[:2], self.group_size
        whole = groups.view(rows, columns, size, size).transpose(1, 2).reshape(rows * size, columns * size)
        return whole[: shape[0], : shape[1]]

    @property
    def height(self) -> int:
        return self.group_size if self.granularity == "block" else 1

    def quantized(self, weight: Tensor, params: Params) -> FloatQTensor:
        return FloatQTensor(self.codes(weight, params), params, self)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        rows, columns = self.groups(shape)
        scale_bits = rows * columns * 8 * self.scale_storage.itemsize + (32 if self.tensor_scale else 0)
        return 8 * packed_bytes(shape[0] * shape[1], self.bits) + scale_bits

    def at(self, bits: int) -> FloatWeight:
        if bits != self.bits:
            raise ValueError(
                f"a weight of element={self.element} has {self.bits} bits, not {bits}; use an integer scheme"
            )
        return self


class FloatQTensor(GroupedQTensor):
    """Packed elements with a scale (N, G), or (1, 1) per tensor, and at most one scale of the whole tensor.

    qweight       (N, K) in torch's dtype of 8-bit elements, otherwise packed uint8
    scale         in the dtype of the format: float32, bfloat16, float8_e8m0fnu or float8_e4m3fn
    tensor_scale  () float32, or None
    """

    fmt: FloatWeight
    scale: Tensor
    tensor_scale: Tensor | None

    def __init__(self, codes: Tensor, params: Params, fmt: FloatWeight) -> None:
        """Store `codes` (N, K) uint8 with parameters of shape `fmt.groups((N, K))`."""
        super().__init__((codes.shape[0], codes.shape[1]), fmt)
        dtype = fmt.kind.dtype
        self.register_buffer("qweight", pack(codes, fmt.bits) if dtype is None else codes.contiguous().view(dtype))
        self.register_buffer("scale", params.scale.float().to(fmt.scale_storage))
        self.register_buffer("tensor_scale", None if params.whole is None else params.whole.float())

    def params(self) -> Params:
        return Params(self.scale.float(), whole=self.tensor_scale)

    def tuner(self) -> Tuner | None:
        return scale_tuner(self)

    def code_rows(self, start: int, stop: int) -> Tensor:
        packed = self.fmt.kind.dtype is None
        return super().code_rows(start, stop) if packed else self.qweight[start:stop].view(torch.uint8)
