"""Quantized weights: the stored tensors, how they are decoded, and how many bits they take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core.formats import grid
from harness.core.formats.packing import pack, packed_bytes, unpack
from harness.core.scheme import WeightFormat

_SLAB_VALUES = 1 << 18  # 1 MiB of float32


@dataclass(frozen=True)
class Tuner:
    """The floats of a quantized weight that fine-tuning may move, while its codes stay.

    values  float32 copies of these floats, by name
    weight  values -> the decoded weight (N, K) float32; differentiable in the values
    accept  values -> None; stores the values, each in its stored dtype
    linear  values and float32 inputs x -> x W^T, only if its gradient is faster than the gradient through `weight`
    """

    values: dict[str, Tensor]
    weight: Callable[[dict[str, Tensor]], Tensor]
    accept: Callable[[dict[str, Tensor]], None]
    linear: Callable[[dict[str, Tensor], Tensor], Tensor] | None = None


class QTensor(nn.Module, ABC):
    """One quantized weight (N out, K in). Every stored tensor is a buffer of this module.

    Subclasses cover integer grids and codebooks. Because all stored tensors are buffers, `stored_bits` counts the
    buffers, and moving the module moves the weight. Buffers are never cast: `dequantize` casts its result.

    kernel            name of the kernel that `linear` runs
    quantizes_inputs  whether `linear` also quantizes its inputs, so that the scheme must not round them again
    """

    kernel: ClassVar[str] = "reference"
    quantizes_inputs: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the stored bits to the weight (N, K)."""

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """y = x W^T + b for inputs x (..., K), computed from the stored bits."""
        return F.linear(inputs, self.dequantize(inputs.dtype), bias)

    def tuner(self) -> Tuner | None:
        """The floats that fine-tuning may change; None if there are none."""
        return None

    def _slab_rows(self, whole: int = 1) -> int:
        """Number of rows to decode at once, a multiple of `whole`: as many as stay in the CPU cache; all on a GPU."""
        rows, columns = self.shape
        if next(self.buffers()).is_cuda:
            return rows
        return max(_SLAB_VALUES // columns // whole * whole, whole)

    @property
    def stored_bits(self) -> int:
        """Number of bits of all buffers, padding included."""
        return 8 * sum(buffer.nbytes for buffer in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits divided by N K."""
        return self.stored_bits / (self.shape[0] * self.shape[1])


class IntQTensor(QTensor):
    """Packed integer codes with scale (N, G), or (1, 1) per tensor, and zero point.

    The zero point is packed at `bits` bits if it is an integer, stored as `scale_dtype` if it is a float, and not
    stored if the format is symmetric.
    """

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat) -> None:
        """Store `codes` (N, K) uint8 with `scale` and `zero_point` of shape `fmt.groups((N, K))`.

        Raises: ValueError if a dtype or shape does not match the format, a scale is not exact in the stored dtype, or
        a zero point is not one that the format can store.
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
        """Build a QTensor from the buffers of another one with the same shape and format."""
        restored = cls.__new__(cls)
        QTensor.__init__(restored, shape)
        restored.fmt = fmt
        for name in ("qweight", "scale", "zero_point"):
            restored.register_buffer(name, buffers.get(name))
        return restored

    def _stored_zero_point(self, zero_point: Tensor) -> Tensor | None:
        if self.fmt.symmetric:
            if not bool((zero_point == self.fmt.mid_code).all()):
                raise ValueError(f"zero_point of a symmetric format must be {self.fmt.mid_code} everywhere")
            return None
        if self.fmt.zero_point == "float":
            return zero_point.to(getattr(torch, self.fmt.scale_dtype))
        packed = zero_point.to(torch.uint8)
        if not torch.equal(packed.to(zero_point.dtype), zero_point):
            raise ValueError(f"zero_point holds {zero_point.flatten()[:3].tolist()}...; expected integers of 0 or more")
        return pack(packed, self.fmt.bits)

    @property
    def codes(self) -> Tensor:
        """Unpacked codes (N, K), uint8."""
        return unpack(self.qweight, self.fmt.bits, self.shape)

    def zero_points(self) -> Tensor:
        """Unpacked zero points in float32, in the shape of `scale`."""
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
        outputs, start = flat.new_empty(flat.shape[0], self.shape[0]), 0
        for slab in self._slabs(inputs.dtype):
            rows = slice(start, start + len(slab))
            outputs[:, rows] = F.linear(flat, slab, None if bias is None else bias[rows])
            start = rows.stop
        return outputs.view(*inputs.shape[:-1], self.shape[0])

    def _slabs(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Decoded rows, one slab at a time."""
        rows, columns = self.shape
        height = self._slab_rows(whole=8)  # the codes of 8 rows fill whole bytes
        scale, zero_point = self.scale.float().expand(rows, -1), self.zero_points().expand(rows, -1)
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            first, last = (packed_bytes(row * columns, self.fmt.bits) for row in (start, stop))
            codes = unpack(self.qweight[first:last], self.fmt.bits, (stop - start, columns))
            groups = codes.view(stop - start, scale.shape[1], -1)
            values = grid.decode(groups, scale[start:stop, :, None], zero_point[start:stop, :, None])
            yield values.view(stop - start, columns).to(dtype)


class MixedQTensor(QTensor):
    """A quantized weight with some input columns stored as floats, which replace the decoded columns.

    The codes of these columns stay stored, and `stored_bits` counts them.
    """

    columns: Tensor
    values: Tensor

    def __init__(self, base: QTensor, columns: Tensor, values: Tensor) -> None:
        """`columns` (C,) are indices into K; `values` (N, C) are the floats, in their stored dtype."""
        super().__init__(base.shape)
        self.base = base
        self.register_buffer("columns", columns.to(_index_dtype(base.shape[1])))
        self.register_buffer("values", values)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        weight = self.base.dequantize(dtype)
        weight[:, self.columns.long()] = self.values.to(dtype)
        return weight


class ScaledQTensor(QTensor):
    """A quantized weight with some input columns that were multiplied by a common factor before rounding."""

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
    """A quantized weight whose groups are formed from reordered input columns (GPTQ's act_order, no static groups)."""

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
    """Quantize a weight (N, K) to its minimum-maximum grid, each value to the nearest code.

    Raises: ValueError if the weight is not finite, or the dtype of the scales cannot hold them.
    """
    scale, zero_point = grid.weight_params(weight, fmt)
    grid.check_scales(weight, scale, fmt)
    return round_to_grid(weight, scale, zero_point, fmt)


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor, fmt: WeightFormat) -> IntQTensor:
    """Quantize a weight (N, K) to the grid of `scale` and `zero_point`, each value to the nearest code."""
    groups = grid.to_groups(weight.to(scale.dtype), fmt)
    codes = grid.encode(groups, scale[..., None], zero_point[..., None], fmt)
    return IntQTensor(codes.view(weight.shape), scale, zero_point, fmt)
