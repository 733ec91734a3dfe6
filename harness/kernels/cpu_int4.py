"""W4A16 on a CPU: torch's int4 kernel for few rows, decoding to bfloat16 in slabs for many.

The kernel (`aten._weight_int4pack_mm_for_cpu`) reads two codes a byte in blocks of 64 output rows, or what its
processor prefers, and a scale and a zero in bfloat16 for each group: weight = (code - 8) * scale + zero. Those pairs
take 32 bits a group where the format stores 16 to 20, so that group64 takes 4.5 bits a weight in memory.
It is vectorised for bfloat16 alone, and multiplies without matrix instructions, so that from some number of rows on
decoding the weight and a bfloat16 matmul is faster.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from harness.core.qtensor import IntQTensor
from harness.core.scheme import WeightFormat
from harness.kernels.base import Kernel

MAX_DIRECT_ROWS = 64  # rows of x from which decoding wins; measured by `python -m harness.kernels.bench`
_GROUPS = (256, 128, 64, 32)  # that the kernel knows
_ROWS = 16  # output rows it wants multiples of
_SLAB = 1536  # output rows decoded at a time: 6 MiB in bfloat16 at K=2048
_MID_CODE = 8
_MOST_ROWS = 128  # two blocks of the widest kind that torch has


def supports(weight: IntQTensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can hold this weight: 4 bits, rows in sixteens, groups in 32s, bfloat16."""
    fits = weight.fmt.bits == 4 and weight.shape[0] % _ROWS == 0 and _group_size(weight.fmt, weight.shape[1]) > 0
    return fits and dtype == torch.bfloat16


class CpuInt4(Kernel):
    """A 4-bit IntQTensor in the order of torch's CPU kernel.

    qweight  (N, K / 2) uint8
    pairs    (G, N, 2) bfloat16: scale and zero of the kernel's groups, which a longer group of the format repeats
    """

    name = "cpu_w4a16"

    qweight: Tensor
    pairs: Tensor

    def __init__(self, weight: IntQTensor) -> None:
        super().__init__(weight.shape)
        rows, columns = weight.shape
        self.group_size = _group_size(weight.fmt, columns)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
        scale = weight.scale.float()
        pairs = torch.stack([scale, (_MID_CODE - weight.zero_points()) * scale], -1).to(torch.bfloat16)
        pairs = pairs.expand(rows, -1, 2).repeat_interleave(columns // self.group_size // pairs.shape[1], 1)
        self.register_buffer("qweight", packed)
        self.register_buffer("pairs", pairs.transpose(0, 1).contiguous())

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        flat = inputs.reshape(-1, self.shape[1])
        found: Tensor
        if flat.shape[0] <= MAX_DIRECT_ROWS:
            found = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.qweight, self.group_size, self.pairs)
        else:
            found = self._by_slabs(flat)
        found = found if bias is None else found + bias
        return found.view(*inputs.shape[:-1], self.shape[0])

    def _by_slabs(self, inputs: Tensor) -> Tensor:
        """y (M, N) of inputs (M, K), decoding `_SLAB` output rows at a time."""
        found = inputs.new_empty(inputs.shape[0], self.shape[0])
        for start in range(0, self.shape[0], _SLAB):
            torch.mm(inputs, self._decoded(start, start + _SLAB), out=found[:, start : start + _SLAB])
        return found

    def _decoded(self, start: int, stop: int) -> Tensor:
        """Columns start to stop of W^T, as (K, columns) bfloat16."""
        columns = self.shape[1]
        codes = _centred(self.qweight[start:stop], columns).view(columns // self.group_size, self.group_size, -1)
        scale, zero = (part.contiguous()[:, None] for part in self.pairs[:, start:stop].unbind(-1))
        return torch.addcmul(zero, codes, scale, out=codes).view(columns, -1)


def _centred(packed: Tensor, columns: int) -> Tensor:
    """code - 8 (K, rows) in bfloat16 of packed rows (rows, K / 2) that start where a block does."""
    width, rows = block_width(), packed.shape[0]
    whole = rows - rows % width
    found = torch.empty(columns, rows, dtype=torch.bfloat16)
    # A byte's upper half with its top bit flipped is code - 8 in two's complement, once shifted down by its sign.
    high, low = ((part ^ 0x80).view(torch.int8) >> 4 for part in (packed, packed << 4))
    for first, last, size in ((0, whole, width), (whole, rows, rows - whole)):
        if first < last:
            blocks = found[:, first:last].view(columns, -1, size)
            for part, place in zip((low, high), _places(size), strict=True):
                blocks[..., place] = part[first:last].reshape(-1, columns, size // 2).transpose(0, 1)
    return found


@functools.cache
def block_width() -> int:
    """Output rows that torch's kernel packs together on this processor."""
    low, _ = _packed_rows(_MOST_ROWS)
    return 2 * low.index(low[0], 1)  # with two columns, the first row comes again where the second column starts


@functools.cache
def _places(size: int) -> tuple[slice, slice]:
    """Which rows of a block of `size` rows are in the low, and which in the high halves of its bytes."""
    low, high = (_as_slice(rows[: size // 2]) for rows in _packed_rows(size))
    return low, high


def _packed_rows(size: int) -> tuple[list[int], list[int]]:
    """The row that each byte holds low, and high, where torch packs a weight of `size` rows and two columns.

    The order depends on the processor, so it is read off packed row numbers, a digit of base 16 at a time.
    """
    rows = torch.arange(size, dtype=torch.int32)[:, None].expand(size, 2)
    first, second = (
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 1).flatten().int()
        for digit in (rows % 16, rows // 16)
    )
    low, high = (first & 0xF) + 16 * (second & 0xF), (first >> 4) + 16 * (second >> 4)
    return low.tolist(), high.tolist()


def _as_slice(rows: list[int]) -> slice:
    step = rows[1] - rows[0]
    found = slice(rows[0], rows[-1] + 1, step)
    if rows != list(range(found.start, found.stop, step)):
        raise RuntimeError(f"torch {torch.__version__} packs int4 rows in an order that is not known here: {rows}")
    return found


def _group_size(fmt: WeightFormat, columns: int) -> int:
    """The largest group of the kernel that divides the format's; 0 if none does."""
    size = columns if fmt.granularity != "group" or fmt.group_size == -1 else fmt.group_size
    return next((group for group in _GROUPS if size % group == 0), 0)
