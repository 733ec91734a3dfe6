"""W4A16 on a CPU: torch's int4 kernel for few rows, decoding to bfloat16 in slabs for many.

The kernel (`aten._weight_int4pack_mm_for_cpu`) reads two codes per byte in blocks of 64 output rows, or of another size
that suits the processor, and a bfloat16 scale and zero per group: weight = (code - 8) * scale + zero. Such a pair takes
32 bits per group, while the format stores 16 to 20 bits, so that group64 takes 4.5 bits per weight in memory.
The kernel is vectorised only for bfloat16 and uses no matrix instructions. Above `MAX_DIRECT_ROWS` rows it is therefore
faster to decode the weight and multiply in bfloat16.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from harness.core import IntQTensor, IntWeight
from harness.kernels.base import Kernel

MAX_DIRECT_ROWS = 64  # up to this number of rows of x the kernel is faster, by `python -m harness.kernels.bench`
_GROUPS = (256, 128, 64, 32)  # group sizes of the kernel
_ROWS = 16  # must divide the number of output rows
_SLAB = 1536  # output rows decoded at a time: 6 MiB in bfloat16 at K=2048
_MID_CODE = 8
_MOST_ROWS = 128  # two blocks of the largest size in torch


def supports(weight: IntQTensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can run this weight: 4 bits, N a multiple of 16, groups a multiple of 32, bfloat16."""
    fits = weight.fmt.bits == 4 and weight.shape[0] % _ROWS == 0 and _group_size(weight.fmt, weight.shape[1]) > 0
    return fits and dtype == torch.bfloat16


class CpuInt4(Kernel):
    """A 4-bit IntQTensor, packed for torch's CPU kernel.

    qweight  (N, K / 2) uint8
    pairs    (G, N, 2) bfloat16: scale and zero of the kernel's groups; a larger group of the format repeats them
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
        outputs: Tensor
        if flat.shape[0] <= MAX_DIRECT_ROWS:
            outputs = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.qweight, self.group_size, self.pairs)
        else:
            outputs = self._by_slabs(flat)
        outputs = outputs if bias is None else outputs + bias
        return outputs.view(*inputs.shape[:-1], self.shape[0])

    def _by_slabs(self, inputs: Tensor) -> Tensor:
        """Compute y (M, N) for inputs (M, K); `_SLAB` output rows are decoded at a time."""
        outputs = inputs.new_empty(inputs.shape[0], self.shape[0])
        for start in range(0, self.shape[0], _SLAB):
            torch.mm(inputs, self._decoded(start, start + _SLAB), out=outputs[:, start : start + _SLAB])
        return outputs

    def _decoded(self, start: int, stop: int) -> Tensor:
        """Columns start to stop of W^T, decoded, as (K, columns) bfloat16."""
        columns = self.shape[1]
        codes = _centred(self.qweight[start:stop], columns).view(columns // self.group_size, self.group_size, -1)
        scale, zero = (part.contiguous()[:, None] for part in self.pairs[:, start:stop].unbind(-1))
        return torch.addcmul(zero, codes, scale, out=codes).view(columns, -1)


def _centred(packed: Tensor, columns: int) -> Tensor:
    """code - 8 (K, rows) in bfloat16, from packed rows (rows, K / 2) that start at a block boundary."""
    width, rows = block_width(), packed.shape[0]
    full_rows = rows - rows % width  # rows in blocks of full width
    centred = torch.empty(columns, rows, dtype=torch.bfloat16)
    # Flipping the top bit of a byte's upper half and shifting it down with its sign gives code - 8.
    high, low = ((part ^ 0x80).view(torch.int8) >> 4 for part in (packed, packed << 4))
    for first, last, size in ((0, full_rows, width), (full_rows, rows, rows - full_rows)):
        if first < last:
            blocks = centred[:, first:last].view(columns, -1, size)
            for part, place in zip((low, high), _places(size), strict=True):
                blocks[..., place] = part[first:last].reshape(-1, columns, size // 2).transpose(0, 1)
    return centred


@functools.cache
def block_width() -> int:
    """Output rows that torch's kernel packs together on this processor."""
    low, _ = _packed_rows(_MOST_ROWS)
    return 2 * low.index(low[0], 1)  # with two columns, the first row appears again where the second column starts


@functools.cache
def _places(size: int) -> tuple[slice, slice]:
    """The rows of a block of `size` rows that are in the low halves, and those in the high halves, of its bytes."""
    low, high = (_as_slice(rows[: size // 2]) for rows in _packed_rows(size))
    return low, high


def _packed_rows(size: int) -> tuple[list[int], list[int]]:
    """The row in the low half and the row in the high half of each byte of a packed weight (`size`, 2).

    The order depends on the processor, so row numbers are packed and read back, one base-16 digit at a time.
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
    places = slice(rows[0], rows[-1] + 1, step)
    if rows != list(range(places.start, places.stop, step)):
        raise RuntimeError(f"torch={torch.__version__} packs int4 rows in the order {rows}; expected equal steps")
    return places


def _group_size(fmt: IntWeight, columns: int) -> int:
    """The largest group size of the kernel that divides the format's; 0 if none does."""
    size = columns if fmt.granularity != "group" or fmt.group_size == -1 else fmt.group_size
    return next((group for group in _GROUPS if size % group == 0), 0)
