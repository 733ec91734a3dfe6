"""Weights on the uniform integer grid: the format, and the stored tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from harness.core.formats import scales
from harness.core.formats.integer import StoredInt
from harness.core.formats.packing import pack, packed_bytes, unpack
from harness.core.formats.params import Params
from harness.core.formats.qtensor import GroupedQTensor, Tuner
from harness.core.formats.scale_tuner import scale_tuner
from harness.core.formats.scaled_weight import ScaledWeight


@dataclass(frozen=True, kw_only=True)
class IntWeight(ScaledWeight, StoredInt):
    """Integer codes of one weight (N out, K in); scales are stored as `scale_dtype`, integer zero points as codes."""

    granularity: Literal["tensor", "channel", "group"] = "channel"

    def quantized(self, weight: Tensor, params: Params) -> IntQTensor:
        return IntQTensor(self.codes(weight, params), params, self)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        rows, columns = self.groups(shape)
        count, scale_bits = rows * columns, rows * columns * scales.BITS[self.scale_dtype]
        bits = 8 * packed_bytes(shape[0] * shape[1], self.bits) + scale_bits
        if self.symmetric:
            return bits
        return bits + (8 * packed_bytes(count, self.bits) if self.zero_point == "integer" else scale_bits)

    def at(self, bits: int) -> IntWeight:
        return replace(self, bits=bits)


class IntQTensor(GroupedQTensor):
    """Packed integer codes with scale (N, G), or (1, 1) per tensor, and zero point.

    The zero point is packed at `bits` bits if it is an integer, stored as `scale_dtype` if it is a float, and not
    stored if the format is symmetric.
    """

    fmt: IntWeight
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, codes: Tensor, params: Params, fmt: IntWeight) -> None:
        """Store `codes` (N, K) uint8 with parameters of shape `fmt.groups((N, K))`.

        Raises: ValueError if a dtype or shape does not match the format, a scale is not exact in the stored dtype, or
        a zero point is not one that the format can store.
        """
        if codes.dtype != torch.uint8:
            raise ValueError(f"codes have dtype {codes.dtype}; expected torch.uint8")
        shape = (codes.shape[0], codes.shape[1])
        super().__init__(shape, fmt)
        expected = fmt.groups(shape)
        for name, part in (("scale", params.scale), ("zero_point", params.zero_point)):
            if part is not None and tuple(part.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(part.shape)}; expected {expected} for a weight of {shape}")
        stored = params.scale.to(getattr(torch, fmt.scale_dtype))
        if not torch.equal(stored.to(params.scale.dtype), params.scale):
            raise ValueError(f"scale is not exact in {fmt.scale_dtype}; round it with scales.store first")
        self.register_buffer("qweight", pack(codes, fmt.bits))
        self.register_buffer("scale", stored)
        self.register_buffer("zero_point", self._stored_zero_point(params.zero_point))

    def _stored_zero_point(self, zero_point: Tensor | None) -> Tensor | None:
        if (zero_point is None) != self.fmt.symmetric:
            expected = "no zero point" if self.fmt.symmetric else "a zero point"
            raise ValueError(f"zero_point does not fit symmetric={self.fmt.symmetric}; expected {expected}")
        if zero_point is None:
            return None
        if self.fmt.zero_point == "float":
            return zero_point.to(getattr(torch, self.fmt.scale_dtype))
        packed = zero_point.to(torch.uint8)
        if not torch.equal(packed.to(zero_point.dtype), zero_point):
            raise ValueError(f"zero_point holds {zero_point.flatten()[:3].tolist()}...; expected integers of 0 or more")
        return pack(packed, self.fmt.bits)

    def zero_points(self) -> Tensor:
        """Unpacked zero points in float32, in the shape of `scale`; the middle code of a symmetric format."""
        if self.zero_point is None:
            return torch.full_like(self.scale, self.fmt.mid_code, dtype=torch.float32)
        if self.zero_point.is_floating_point():
            return self.zero_point.float()
        return unpack(self.zero_point, self.fmt.bits, tuple(self.scale.shape)).float()

    def params(self) -> Params:
        return Params(self.scale.float(), None if self.fmt.symmetric else self.zero_points())

    def tuner(self) -> Tuner | None:
        return scale_tuner(self)
