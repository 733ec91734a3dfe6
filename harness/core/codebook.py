"""Codebooks: a weight is one of a few levels times the scale of its block, and scales may be stored like that too.

Blocks are of consecutive values of the flattened weight, so they span rows, and the last one may be short. A block's
scale is its largest magnitude. The code of a value is its nearest level once it was divided by that; of two equally
near ones, the lower. All of it is in float32.

Double quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3) stores the scales less their mean as codes of
the signed dynamic map, in blocks of 256 that have a scale each (Dettmers 2015, arXiv 1511.04561, section 3.1).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import grid
from harness.core.packing import pack, unpack
from harness.core.qtensor import QTensor

BITS = 4
NESTED_BLOCK = 256  # scales that share a scale of their own
_SMALLEST = 1e-38  # a block of zeros is divided by it
_SLAB_VALUES = 1 << 17  # values decoded at once: 512 KiB of float32, which stay in a processor's cache


class LevelsQTensor(QTensor):
    """4-bit codes of a weight (N, K) in blocks over its flattened values.

    qweight        (N K / 2,) uint8, two codes a byte
    levels         (16,) float32, by code
    absmax         (blocks,) the block's largest magnitude: float32, or uint8 codes under double quantization
    nested_absmax, nested_levels, offset  what decodes those codes: (blocks / 256,), (256,) and () float32
    """

    kernel: ClassVar[str] = "codebook"

    qweight: Tensor
    levels: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_levels: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: Tensor, levels: Tensor, block_size: int, double_quant: bool) -> None:
        """Quantize a float `weight` (N, K).

        Raises: ValueError if it has a value that is not finite in float32.
        """
        super().__init__((weight.shape[0], weight.shape[1]))
        self.block_size = block_size
        values = weight.reshape(-1).float()
        grid.check_finite(values)
        codes, absmax = encode_blocks(values, levels, block_size)
        offset = book = nested = None
        if double_quant:
            offset, book = absmax.mean(), dynamic_levels().to(absmax.device)
            absmax, nested = encode_blocks(absmax - offset, book, NESTED_BLOCK)
        self.register_buffer("qweight", pack(codes, BITS))
        self.register_buffer("levels", levels)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested)
        self.register_buffer("nested_levels", book)
        self.register_buffer("offset", offset)

    @property
    def codes(self) -> Tensor:
        """Unpacked codes (N, K), uint8."""
        return unpack(self.qweight, BITS, self.shape)

    def scales(self) -> Tensor:
        """The blocks' scales (blocks,) in float32, as the stored bits have them."""
        if self.nested_levels is None or self.nested_absmax is None or self.offset is None:
            return self.absmax
        return decode_blocks(self.nested_levels[self.absmax.int()], self.nested_absmax, NESTED_BLOCK) + self.offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decoded a slab of whole blocks at a time, two codes by one look-up; products are rounded once to float32."""
        pairs, scales = _pairs(self.levels), self.scales()
        found = torch.empty(2 * len(self.qweight), dtype=dtype, device=self.qweight.device)
        blocks = max(_SLAB_VALUES // self.block_size // 2 * 2, 2)  # an even number fills whole bytes
        step = blocks * self.block_size
        for i, slab in enumerate(self.qweight.split(step // 2)):
            values = pairs.index_select(0, slab.int()).view(torch.float32)
            parts = scales[i * blocks : (i + 1) * blocks]
            found[i * step : i * step + len(values)] = decode_blocks(values, parts, self.block_size)
        return found[: self.shape[0] * self.shape[1]].view(self.shape)


def encode_blocks(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of flat `values` (n,) float32, and the largest magnitude of each block, (blocks,) float32."""
    blocks = F.pad(values, (0, -len(values) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    shares = blocks * absmax.clamp(min=_SMALLEST).reciprocal()[:, None]
    return nearest(shares, levels).view(-1)[: len(values)], absmax


def decode_blocks(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Flat levels (n,) times the scales (blocks,) of their blocks, in place."""
    whole = len(values) // block_size
    values[: whole * block_size].view(whole, block_size).mul_(scales[:whole, None])
    if whole < len(scales):
        values[whole * block_size :].mul_(scales[whole])
    return values


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The code of the nearest of up to 256 `levels`, which may be in any order, to each of `values`; uint8."""
    ascending, order = levels.sort(stable=True)
    ranks = torch.bucketize(values, (ascending[1:] + ascending[:-1]) / 2, out_int32=True)
    return order.to(torch.uint8).index_select(0, ranks.view(-1)).view(values.shape)


def dynamic_levels() -> Tensor:
    """The 256 levels of the signed dynamic map in float32, ascending from about -0.993 to 1.

    A sign, an exponent e from 0 to -6 in base ten, and a fraction of 6 + e bits: the middles of 2^(6 + e) equal parts
    of [0.1, 1], times 10^e. Beside them 0 and 1.
    """
    positive = torch.cat([_middles(1 << (6 + e)) * 10.0**e for e in range(0, -7, -1)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


def _middles(parts: int) -> Tensor:
    edges = torch.linspace(0.1, 1, parts + 1)
    return (edges[1:] + edges[:-1]) / 2


def _pairs(levels: Tensor) -> Tensor:
    """Both levels that a byte of two codes stands for, (256,), each pair as the bits of one int64."""
    both = torch.cartesian_prod(levels, levels).flip(1)  # the first code is in the low bits
    return both.contiguous().view(torch.int64).view(-1)
