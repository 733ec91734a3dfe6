"""Quantized weights: the stored tensors, how they are decoded, and how many bits they take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.core.formats.format import WeightFormat, padded
from harness.core.formats.packing import packed_bytes, unpack
from harness.core.formats.params import Params

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


class GroupedQTensor(QTensor):
    """Codes of a format whose groups are consecutive inputs of an output row, decoded a few rows at a time.

    qweight  the packed codes
    """

    qweight: Tensor

    def __init__(self, shape: tuple[int, int], fmt: WeightFormat) -> None:
        super().__init__(shape)
        self.fmt = fmt

    @abstractmethod
    def params(self) -> Params:
        """The parameters of the groups, (N, G) or (1, 1), in float32."""

    def code_rows(self, start: int, stop: int) -> Tensor:
        """Codes of the rows from `start` to `stop`, (rows, K) uint8; both are multiples of 8, or the last row."""
        rows, columns = stop - start, self.shape[1]
        first, last = (packed_bytes(row * columns, self.fmt.bits) for row in (start, stop))
        return unpack(self.qweight[first:last], self.fmt.bits, (rows, columns))

    @property
    def codes(self) -> Tensor:
        """Unpacked codes (N, K), uint8."""
        return self.code_rows(0, self.shape[0])

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
        params, span = self.params(), min(self.fmt.span(columns), columns)
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            part = self.fmt.by_row(params, torch.arange(start, stop, device=params.scale.device)).spread()
            codes = padded(self.code_rows(start, stop), span).view(stop - start, -1, span)
            yield self.fmt.decode(codes, part).view(stop - start, -1)[:, :columns].to(dtype)


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

    def tuner(self) -> Tuner | None:
        """That of `base`, whose columns it puts in their places."""
        tuner, inverse = self.base.tuner(), self.order.long().argsort()
        return (
            None
            if tuner is None
            else replace(tuner, weight=lambda values: tuner.weight(values)[:, inverse], linear=None)
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.base.dequantize(dtype)[:, self.order.long().argsort()]


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
