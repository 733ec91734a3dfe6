"""Codebooks of levels: a weight is one of 16 levels times the scale of its block; scales may be quantized likewise.

Blocks are consecutive values of the flattened weight, so they span rows, and the last block may be short. A block's
scale is its largest magnitude. A value is divided by the scale of its block, and its code is that of the nearest level;
a tie goes to the lower level. All arithmetic is in float32.

Double quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3) subtracts the mean from the scales and stores
them as codes of the signed dynamic map (Dettmers 2015, arXiv 1511.04561, section 3.1), in blocks of 256 with one scale
each.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.finite import check_finite
from harness.core.formats.packing import pack, unpack
from harness.core.formats.qtensor import QTensor

BITS = 4
NESTED_BLOCK = 256  # scales that share one nested scale
_SMALLEST = 1e-38  # divisor of a block of zeros
_SLAB_VALUES = 1 << 17  # values decoded at once: 512 KiB of float32, which stay in the CPU cache


class LevelsQTensor(QTensor):
    """4-bit codes of a weight (N, K) in blocks over its flattened values.

    qweight        (N K / 2,) uint8, two codes a byte
    levels         (16,) float32, by code
    absmax         (blocks,) the block's largest magnitude: float32, or uint8 codes under double quantization
    nested_absmax  (blocks / 256,) float32 scales of these uint8 codes; this and the next two are None otherwise
    nested_levels  (256,) float32 levels of these codes
    offset         () float32 mean of the block scales
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

        Raises: ValueError if a value is not finite in float32.
        """
        super().__init__((weight.shape[0], weight.shape[1]))
        self.block_size = block_size
        values = weight.reshape(-1).float()
        check_finite(values)
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
        """The scales of the blocks, (blocks,) float32, decoded from the stored bits."""
        if self.nested_levels is None or self.nested_absmax is None or self.offset is None:
            return self.absmax
        return decode_blocks(self.nested_levels[self.absmax.int()], self.nested_absmax, NESTED_BLOCK) + self.offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode whole blocks slab by slab, two codes per table look-up; each product is rounded once, to float32."""
        pairs, scales = _pairs(self.levels), self.scales()
        decoded = torch.empty(2 * len(self.qweight), dtype=dtype, device=self.qweight.device)
        blocks = max(_SLAB_VALUES // self.block_size // 2 * 2, 2)  # an even number of blocks fills whole bytes
        step = blocks * self.block_size
        for i, slab in enumerate(self.qweight.split(step // 2)):
            values = pairs.index_select(0, slab.int()).view(torch.float32)
            parts = scales[i * blocks : (i + 1) * blocks]
            decoded[i * step : i * step + len(values)] = decode_blocks(values, parts, self.block_size)
        return decoded[: self.shape[0] * self.shape[1]].view(self.shape)


def encode_blocks(values: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of flat `values` (n,) float32, and the largest magnitude of each block, (blocks,) float32."""
    blocks = F.pad(values, (0, -len(values) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    shares = blocks * absmax.clamp(min=_SMALLEST).reciprocal()[:, None]
    return nearest(shares, levels).view(-1)[: len(values)], absmax


def decode_blocks(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Multiply flat levels (n,) by the scales (blocks,) of their blocks, in place."""
    whole = len(values) // block_size
    values[: whole * block_size].view(whole, block_size).mul_(scales[:whole, None])
    if whole < len(scales):
        values[whole * block_size :].mul_(scales[whole])
    return values


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Code (uint8) of the nearest level for each of `values`; `levels` has at most 256 entries, in any order."""
    ascending, order = levels.sort(stable=True)
    ranks = torch.bucketize(values, (ascending[1:] + ascending[:-1]) / 2, out_int32=True)
    return order.to(torch.uint8).index_select(0, ranks.view(-1)).view(values.shape)


def dynamic_levels() -> Tensor:
    """The 256 levels of the signed dynamic map in float32, ascending from about -0.993 to 1.

    Each level has a sign, a decimal exponent e from 0 to -6 and a fraction of 6 + e bits: the midpoints of 2^(6 + e)
    equal parts of [0.1, 1], times 10^e. Two more levels are 0 and 1.
    """
    positive = torch.cat([_middles(1 << (6 + e)) * 10.0**e for e in range(0, -7, -1)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


def _middles(parts: int) -> Tensor:
    edges = torch.linspace(0.1, 1, parts + 1)
    return (edges[1:] + edges[:-1]) / 2


def _pairs(levels: Tensor) -> Tensor:
    """The two levels of each byte of two codes, (256,), each pair stored as the bits of one int64."""
    pairs = torch.cartesian_prod(levels, levels).flip(1)  # the first code is in the low bits
    return pairs.contiguous().view(torch.int64).view(-1)
