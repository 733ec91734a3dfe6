"""Quantized weights: what is stored, what it decodes to, and how many bits it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core import grid
from harness.core.packing import pack, packed_bytes, unpack
from harness.core.scheme import WeightFormat

_SLAB_VALUES = 1 << 18  # 1 MiB of float32


@dataclass(frozen=True)
class Tuner:
    """The floats of a quantized weight that fine-tuning may move, while its codes stay.

    values  copies of them in float32, by name
    weight  the weight (N, K) float32 that given values and the codes decode to; differentiable in the values
    accept  store given values, in the dtypes in which they are kept
    linear  x W^T for given values and float32 inputs x, where that has a quicker gradient than by the weight
    """

    values: dict[str, Tensor]
    weight: Callable[[dict[str, Tensor]], Tensor]
    accept: Callable[[dict[str, Tensor]], None]
    linear: Callable[[dict[str, Tensor], Tensor], Tensor] | None = None


class QTensor(nn.Module, ABC):
    """One quantized weight (N out, K in). All that is stored is a buffer of this module.

    Integer grids and codebooks alike are subclasses, so `stored_bits` is counted from the buffers and
    moving the module moves the weight. Buffers are never cast: `dequantize` casts its result.

    kernel            name of what `linear` runs
    quantizes_inputs  whether `linear` quantizes its inputs too, so that the scheme's own rounding must not
    """

    kernel: ClassVar[str] = "reference"
    quantizes_inputs: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) that the stored bits stand for."""

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """y = x W^T + b of inputs (..., K), from the stored bits."""
        return F.linear(inputs, self.dequantize(inputs.dtype), bias)

    def tuner(self) -> Tuner | None:
        """What fine-tuning may move; None where it is nothing."""
        return None

    def _slab_rows(self, whole: int = 1) -> int:
        """How many rows to decode at once, a multiple of `whole`: they stay in a processor's cache; on a GPU, all."""
        rows, columns = self.shape
        if next(self.buffers()).is_cuda:
            return rows
        return max(_SLAB_VALUES // columns // whole * whole, whole)

    @property
    def stored_bits(self) -> int:
        """Bits of all buffers, padding included."""
        return 8 * sum(buffer.nbytes for buffer in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over N K."""
        return self.stored_bits / (self.shape[0] * self.shape[1])


class IntQTensor(QTensor):
    """Packed integer codes with scale (N, G), or (1, 1) per tensor, and zero point.

    The zero point is packed at `bits` bits, stored as a float, or, if symmetric, not stored at all.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat) -> None:
        """Store `codes` (N, K) uint8 with `scale` and `zero_point` of shape `fmt.groups((N, K))`.

        Raises: ValueError if a shape is not what the format asks for, or a scale cannot be stored exactly.
        """
        if codes.dtype != torch.uint8:
            raise ValueError(f"codes have dtype {codes.dtype}; expected torch.uint8")
        shape = (codes.shape[0], codes.shape[1])
        super().__init__(shape)
        self.fmt = fmt
        expected = fmt.groups(shape)
        for name, part in (("scale", scale), ("zero_point", zero_point)):
            if tuple(part.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(part.shape)}; expected {expected} for a weight of {shape}")
        stored = scale.to(getattr(torch, fmt.scale_dtype))
        if not torch.equal(stored.to(scale.dtype), scale):
            raise ValueError(f"scale is not exact in {fmt.scale_dtype}; round it with grid.store_scale first")
        self.register_buffer("qweight", pack(codes, fmt.bits))
        self.register_buffer("scale", stored)
        self.register_buffer("zero_point", self._stored_zero_point(zero_point))

    @classmethod
    def stored(cls, buffers: dict[str, Tensor], shape: tuple[int, int], fmt: WeightFormat) -> IntQTensor:
        """The QTensor of buffers that one of this shape and format had."""
        found = cls.__new__(cls)
        QTensor.__init__(found, shape)
        found.fmt = fmt
        for name in ("qweight", "scale", "zero_point"):
            found.register_buffer(name, buffers.get(name))
        return found

    def _stored_zero_point(self, zero_point: Tensor) -> Tensor | None:
        if self.fmt.symmetric:
            if not bool((zero_point == self.fmt.mid_code).all()):
                raise ValueError(f"zero_point of a symmetric format must be {self.fmt.mid_code} everywhere")
            return None
        if self.fmt.zero_point == "float":
            return zero_point.to(getattr(torch, self.fmt.scale_dtype))
        packed = zero_point.to(torch.uint8)
        if not torch.equal(packed.to(zero_point.dtype), zero_point):
            raise ValueError(f"zero_point holds {zero_point.flatten()[:3].tolist()}...; expected integers from 0 on")
        return pack(packed, self.fmt.bits)

    @property
    def codes(self) -> Tensor:
        """Unpacked codes (N, K), uint8."""
        return unpack(self.qweight, self.fmt.bits, self.shape)

    def zero_points(self) -> Tensor:
        """Unpacked zero points in float32, of the shape of `scale`."""
        if self.zero_point is None:
            return torch.full_like(self.scale, self.fmt.mid_code, dtype=torch.float32)
        if self.zero_point.is_floating_point():
            return self.zero_point.float()
        return unpack(self.zero_point, self.fmt.bits, tuple(self.scale.shape)).float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        slabs = self._slabs(dtype)
        first = next(slabs)
        return first if len(first) == self.shape[0] else torch.cat([first, *slabs])

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        flat = inputs.reshape(-1, self.shape[1])
        found, start = flat.new_empty(flat.shape[0], self.shape[0]), 0
        for slab in self._slabs(inputs.dtype):
            rows = slice(start, start + len(slab))
            found[:, rows] = F.linear(flat, slab, None if bias is None else bias[rows])
            start = rows.stop
        return found.view(*inputs.shape[:-1], self.shape[0])

    def _slabs(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Decoded rows, a slab at a time."""
        rows, columns = self.shape
        height = self._slab_rows(whole=8)  # whose codes fill whole bytes
        scale, zero_point = self.scale.float().expand(rows, -1), self.zero_points().expand(rows, -1)
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            first, last = (packed_bytes(row * columns, self.fmt.bits) for row in (start, stop))
            codes = unpack(self.qweight[first:last], self.fmt.bits, (stop - start, columns))
            groups = codes.view(stop - start, scale.shape[1], -1)
            values = grid.decode(groups, scale[start:stop, :, None], zero_point[start:stop, :, None])
            yield values.view(stop - start, columns).to(dtype)


class MixedQTensor(QTensor):
    """A quantized weight with some input columns (K) kept as floats beside it, which take the place of its own.

    The codes of those columns stay stored, and are counted.
    """

    columns: Tensor
    values: Tensor

    def __init__(self, base: QTensor, columns: Tensor, values: Tensor) -> None:
        """`columns` (C,) are indices into K, `values` (N, C) the floats as they are to be stored."""
        super().__init__(base.shape)
        self.base = base
        self.register_buffer("columns", columns.to(_index_dtype(base.shape[1])))
        self.register_buffer("values", values)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self.base.dequantize(dtype)
        weight[:, self.columns.long()] = self.values.to(dtype)
        return weight


class ScaledQTensor(QTensor):
    """A quantized weight with some input columns that were multiplied by one factor before rounding."""

    columns: Tensor
    factor: Tensor

    def __init__(self, base: QTensor, columns: Tensor, factor: float) -> None:
        """`columns` (C,) are indices into K; decoding divides them by `factor`."""
        super().__init__(base.shape)
        self.base = base
        self.register_buffer("columns", columns.to(_index_dtype(base.shape[1])))
        self.register_buffer("factor", torch.tensor(factor, dtype=torch.float32))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self.base.dequantize()
        weight[:, self.columns.long()] /= self.factor
        return weight.to(dtype)


class PermutedQTensor(QTensor):
    """A quantized weight whose groups are of input columns in another order (GPTQ's act_order, no static groups)."""

    order: Tensor

    def __init__(self, base: QTensor, order: Tensor) -> None:
        """Column i of `base` is column order[i] of the weight."""
        super().__init__(base.shape)
        self.base = base
        self.register_buffer("order", order.to(_index_dtype(base.shape[1])))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.base.dequantize(dtype)[:, self.order.long().argsort()]


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32


def round_to_nearest(weight: Tensor, fmt: WeightFormat) -> IntQTensor:
    """Quantize a weight (N, K) to its minimum-maximum grid, each value to the nearest code."""
    return round_to_grid(weight, *grid.weight_params(weight, fmt), fmt)


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat) -> IntQTensor:
    """Quantize a weight (N, K) to the grid of `scale` and `zero_point`, each value to the nearest code."""
    groups = grid.to_groups(weight.to(scale.dtype), fmt)
    codes = grid.encode(groups, scale[..., None], zero_point[..., None], fmt)
    return IntQTensor(codes.view(weight.shape), scale, zero_point, fmt)
