"""Additive codebooks: each group of g neighbouring weights is a sum of vectors, one from each of M codebooks.

Every weight (N, K) has its own codebooks. Babenko and Lempitsky 2014, additive quantization; Egiazarian et al. 2024,
arXiv 2401.06118, equation 2 and figure 3:

    w[r, g j : g j + g] = scale[r] sum_m codebooks[m, codes[j, m, r]]

y = x W^T is computed in one of two ways. For few rows of x, a table holds all products <x_j, codebooks[m, c]>, and each
output sums G M entries of the table: no weight is decoded. For more rows of x, the weight is decoded in slabs of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats.packing import pack, unpack
from harness.core.formats.qtensor import QTensor, Tuner

# Inputs of at most this many rows use the table. Measured on one AVX-512 core, weights of (576, 576) to (4096, 4096),
# codebooks of 2 x 256 and 1 x 4096. Time relative to decoding: 1 row 0.2 to 0.9, 2 rows 0.2 to 1.3, 4 rows 0.6 to 2.5.
_LOOKUP_ROWS = 2

_MOST_LOST = 0.01  # of the norm, by rounding to float16


class Gather:
    """The linear map from codebooks to vectors, v_i = sum_m codebooks[m, codes[i, m]], and its transpose.

    The codes are sorted once, so that the transpose sums consecutive ranges of the index and takes as long as the map.
    """

    def __init__(self, codes: Tensor, entries: int) -> None:
        """`codes` (n, M), any integer dtype, each less than `entries`."""
        self.codebooks, self.entries = codes.shape[1], entries
        self.index = flat_index(codes, entries)

    @cached_property
    def source(self) -> Tensor:
        """The vector of each code, (n M,) int32, in the order of the entries that the codes select."""
        return (self.index.view(-1).argsort(stable=True) // self.codebooks).to(torch.int32)

    @cached_property
    def starts(self) -> Tensor:
        """The first place of each entry in `source`, (M entries,) int32."""
        ends = torch.bincount(self.index.view(-1), minlength=self.codebooks * self.entries).cumsum(0)
        return F.pad(ends[:-1], (1, 0)).to(torch.int32)

    def apply(self, codebooks: Tensor) -> Tensor:
        """Vectors (n, g) for codebooks (M, entries, g)."""
        vectors: Tensor = F.embedding_bag(self.index, codebooks.reshape(-1, codebooks.shape[-1]), mode="sum")
        return vectors

    def transpose(self, vectors: Tensor) -> Tensor:
        """For every entry, the sum of all `vectors` (n, d) whose code selects it: (M, entries, d)."""
        sums: Tensor = F.embedding_bag(self.source, vectors, self.starts, mode="sum")
        return sums.view(self.codebooks, self.entries, -1)

    def counts(self) -> Tensor:
        """Number of vectors whose code selects each entry, (M, entries)."""
        ends = F.pad(self.starts[1:], (0, 1), value=len(self.source))
        return (ends - self.starts).view(self.codebooks, self.entries)


class _Gathered(torch.autograd.Function):
    """`Gather.apply` with `Gather.transpose` as its gradient."""

    @staticmethod
    def forward(ctx: Any, codebooks: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return gather.apply(codebooks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gather.transpose(grads[0].contiguous()), None


class AdditiveQTensor(QTensor):
    """Packed codes (G, M, N) of `code_bits` bits, `codebooks` (M, 2^code_bits, g) and `scale` (N,), both float16."""

    kernel: ClassVar[str] = "additive"

    qweight: Tensor
    codebooks: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, codebooks: Tensor, scale: Tensor) -> None:
        """Store `codes` (G, M, N), any integer dtype, with float codebooks and scales.

        Raises: ValueError if the shapes do not match, or the floats are beyond the range of float16.
        """
        groups, count, rows = codes.shape
        if codebooks.dim() != 3 or codebooks.shape[0] != count or scale.shape != (rows,):
            raise ValueError(
                f"codebooks have shape {tuple(codebooks.shape)} and scale {tuple(scale.shape)}; expected "
                f"({count}, entries, group_size) and ({rows},) for codes of shape {tuple(codes.shape)}"
            )
        super().__init__((rows, groups * codebooks.shape[2]))
        self.code_bits = (codebooks.shape[1] - 1).bit_length()
        if codebooks.shape[1] != 1 << self.code_bits:
            raise ValueError(f"codebooks have {codebooks.shape[1]} entries; expected a power of two")
        self.register_buffer("qweight", pack(codes, self.code_bits))
        self.register_buffer("codebooks", half(codebooks, "codebooks"))
        self.register_buffer("scale", half(scale, "scale"))

    @property
    def group_size(self) -> int:
        return self.codebooks.shape[2]

    @property
    def codes(self) -> Tensor:
        """Unpacked codes (G, M, N): uint8 up to 8 bits, int32 above."""
        shape = (self.shape[1] // self.group_size, len(self.codebooks), self.shape[0])
        return unpack(self.qweight, self.code_bits, shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        slabs = [scale[:, None] * vectors for vectors, scale in self._slabs(_exact(dtype))]
        return torch.cat(slabs).to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        flat = inputs.reshape(-1, self.shape[1])
        outputs = self._looked_up(flat) if len(flat) <= _LOOKUP_ROWS else self._decoded(flat)
        outputs = outputs if bias is None else outputs + bias
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], self.shape[0])

    def _looked_up(self, inputs: Tensor) -> Tensor:
        """x W^T of inputs (T, K) by a table (T, G M, entries) of products; sums are in float32 or float64."""
        dtype, codes = _exact(inputs.dtype), self.codes
        groups, count, rows = codes.shape
        entries = self.codebooks.to(dtype).view(-1, self.group_size)
        table = inputs.to(dtype).view(-1, groups, self.group_size) @ entries.T
        index = codes.view(1, groups * count, rows).long().expand(len(inputs), -1, -1)
        return table.view(len(inputs), groups * count, -1).gather(2, index).sum(1) * self.scale.to(dtype)

    def _decoded(self, inputs: Tensor) -> Tensor:
        """x W^T of inputs (T, K) by the decoded weight; the scale is applied to the product."""
        products = [inputs @ vectors.T * scale for vectors, scale in self._slabs(inputs.dtype)]
        return torch.cat(products, -1)

    def _slabs(self, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Decoded rows without their scale, and their scales, one slab of rows at a time."""
        rows, columns = self.shape
        height = self._slab_rows()
        codes, scale, exact = self.codes.permute(2, 0, 1), self.scale.to(dtype), _exact(dtype)
        entries = self.codebooks.to(exact).view(-1, self.group_size)
        for start in range(0, rows, height):
            slab = codes[start : start + height]
            index = flat_index(slab.reshape(-1, len(self.codebooks)), self.codebooks.shape[1])
            vectors = F.embedding_bag(index, entries, mode="sum")
            yield vectors.view(len(slab), columns).to(dtype), scale[start : start + height]

    def tuner(self) -> Tuner:
        """A tuner of codebooks and scales; the codes do not change."""
        gather = Gather(self.codes.permute(2, 0, 1).reshape(-1, len(self.codebooks)), self.codebooks.shape[1])
        stored = {"codebooks": self.codebooks, "scale": self.scale}

        def weight(values: dict[str, Tensor]) -> Tensor:
            vectors: Tensor = _Gathered.apply(values["codebooks"], gather)  # type: ignore[no-untyped-call]
            return values["scale"][:, None] * vectors.view(self.shape)

        def accept(values: dict[str, Tensor]) -> None:
            rounded = {name: half(values[name].detach(), name) for name in stored}
            for name, value in rounded.items():
                stored[name].copy_(value)

        return Tuner({name: value.float() for name, value in stored.items()}, weight, accept)


def flat_index(codes: Tensor, entries: int) -> Tensor:
    """Codes (n, M) as indices (n, M) int32 into the concatenated codebooks, (M entries, g)."""
    first = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) * entries
    return (codes.to(torch.int32) + first).contiguous()


def half(values: Tensor, name: str, whole: Tensor | None = None) -> Tensor:
    """A copy of `values` in float16.

    Raises: ValueError if a value is NaN or exceeds the range of float16, or if the values are so far below this range
    that rounding loses more than 1 % of `whole` (by default of `values`), in the Frobenius norm. The message names the
    tensor `name`.
    """
    rounded = values.to(torch.float16, copy=True)
    if not torch.isfinite(rounded).all():
        raise ValueError(f"{name} reaches {float(values.abs().max()):.3g}; expected at most 65504, float16's largest")
    exact = values.double()  # in float32, the squares of values below 1e-23 are 0
    if (rounded.double() - exact).norm() > _MOST_LOST * (exact if whole is None else whole.double()).norm():
        largest = float(values.abs().max())
        raise ValueError(f"{name} is {largest:.3g}, below float16's range; expected 6e-5 or more, skip this linear")
    return rounded


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)
