"""The order in which the native kernels read codes: panels of 16 output rows, blocks of 32 inputs.

A block of one row is `bits` words of 32 bits. Widths that divide 32 fill the words in order. At 3, 5 and 6 bits a word
holds whole codes in its lower 30 bits, and the upper two bits of the words hold the last code of each half block; so
each code but these two is found by one shift. codes.h reads the same order.
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
_WORD = 32


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
    if _WORD % bits == 0:
        count = _WORD // bits
        return tuple(_Piece(k, 0, bits, k // count, bits * (k % count)) for k in range(BLOCK))
    return tuple(piece for half in (0, 1) for piece in (*_whole(bits, half), *_last(bits, half)))


def _whole(bits: int, half: int) -> list[_Piece]:
    """The first 15 codes of a half block."""
    count, slots = (_WORD - 2) // bits, range(15 * half, 15 * half + 15)
    return [_Piece(16 * half + i, 0, bits, slot // count, bits * (slot % count)) for i, slot in enumerate(slots)]


def _last(bits: int, half: int) -> list[_Piece]:
    """The last code of a half block: two bits of each of its words, and one of the middle word if there is one."""
    first = (bits + 1) // 2 if half else 0
    pieces = [_Piece(16 * half + 15, 2 * i, 2, first + i, 30) for i in range(bits // 2)]
    middle = [_Piece(16 * half + 15, bits - 1, 1, bits // 2, 30 + half)] if bits % 2 else []
    return pieces + middle
