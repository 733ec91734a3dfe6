"""The order in which the native kernels read codes: panels of 16 output rows, blocks of 32 inputs.

A block of one row is `bits` words of 32 bits. Four neighbouring inputs lie at the same place of the four bytes of a
word, so that one shift and one mask give the operand of a product of bytes, and one shift brings any code to the lowest
bits. A width is split into planes of 8, 4, 2 or 1 bits (5 = 4 + 1), and each plane into words. Of 3 bits every code
would need two planes; here a byte holds two codes, and only the last eight inputs of a block are put together from what
is left of the bytes. codes.h reads this order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PANEL = 16  # output rows
BLOCK = 32  # inputs
HALF = 16  # inputs that are decoded together; a group is a multiple of it
WIDTHS = (2, 3, 4, 5, 6, 8)  # bits of a stored code
_PLANES = {2: (2,), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # lowest bits first


@dataclass(frozen=True)
class _Piece:
    """`width` bits of code `k` of a block, from its bit `low` on, lie in word `word` from bit `shift` on."""

    k: int
    low: int
    width: int
    word: int
    shift: int


def pack_panels(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K), any integer dtype, as (panels, blocks, bits, 16) int32; missing rows and inputs have code 0."""
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % BLOCK, 0, -rows % PANEL))
    blocks = padded.view(-1, PANEL, padded.shape[1] // BLOCK, BLOCK).permute(0, 2, 3, 1)  # (panels, blocks, 32, 16)
    words = torch.zeros(*blocks.shape[:2], bits, PANEL, dtype=torch.int32, device=codes.device)
    for piece in _pieces(bits):
        part = blocks[:, :, piece.k].int() >> piece.low & (1 << piece.width) - 1
        words[:, :, piece.word] |= part << piece.shift
    return words


def in_pairs(words: Tensor) -> Tensor:
    """Words of `pack_panels` in the order of floats: a pair of inputs of all 16 rows, and then the next pair.

    A pair has 16 bits, of which shifts make two halves (IEEE 754); 16 of these in a row are widened by one instruction.
    """
    pairs = words.view(torch.int16).view(*words.shape, 2).transpose(-1, -2)
    return pairs.contiguous().view(torch.int32).view(words.shape)


def unpack_panels(words: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes (N, K) uint8 from the result of `pack_panels`."""
    panels, blocks, bits, _ = words.shape
    codes = torch.zeros(panels, blocks, BLOCK, PANEL, dtype=torch.uint8, device=words.device)
    for piece in _pieces(bits):
        part = words[:, :, piece.word] >> piece.shift & (1 << piece.width) - 1
        codes[:, :, piece.k] |= (part << piece.low).to(torch.uint8)
    return codes.permute(0, 3, 1, 2).reshape(panels * PANEL, blocks * BLOCK)[: shape[0], : shape[1]]


def pack_groups(values: Tensor, rows: int) -> Tensor:
    """One value per group, (N, G) or (1, 1), as (panels, G, 16) in the same dtype; missing rows have 0."""
    padded = F.pad(values.expand(rows, -1), (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, padded.shape[1]).transpose(1, 2).contiguous()


@functools.cache
def _pieces(bits: int) -> tuple[_Piece, ...]:
    if bits == 3:
        return tuple(piece for k in range(BLOCK) for piece in _pieces_of_3(k))
    pieces, low = list[_Piece](), 0
    for width in _PLANES[bits]:
        pieces += [_piece(k, low, width) for k in range(BLOCK)]
        low += width
    return tuple(pieces)


def _piece(k: int, low: int, width: int) -> _Piece:
    """A plane of bits [low, low + width) begins at word `low`, because one bit of a block is one word."""
    four, byte = divmod(k, 4)
    word, place = divmod(four, 8 // width)
    return _Piece(k, low, width, low + word, 8 * byte + width * place)


def _pieces_of_3(k: int) -> tuple[_Piece, ...]:
    """Two codes to a byte; the last two fours have two bits in words 0 and 1, and one bit in word 2."""
    four, byte = divmod(k, 4)
    if four < 6:
        return (_Piece(k, 0, 3, four // 2, 8 * byte + 3 * (four % 2)),)
    return _Piece(k, 0, 2, four - 6, 8 * byte + 6), _Piece(k, 2, 1, 2, 8 * byte + four)
