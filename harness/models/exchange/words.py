"""Codes in words and bytes, as GPTQ, AWQ, compressed-tensors, HQQ and quanto store them: reading, and writing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats.packing import pack, unpack
from harness.models.exchange.reader import damaged

WORD = 32


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of `words` (R, W) int32: uint8 (R, count).

    Codes follow one another from the least significant bit of the first word, also across words.
    Raises: CheckpointError if rows hold fewer codes.
    """
    if count * bits > words.shape[1] * WORD:
        raise damaged(f"rows of {words.shape[1]} words hold no {count} codes of {bits} bits")
    whole = F.pad(words, (0, -words.shape[1] % bits))  # so that rows end with a code
    codes = unpack(whole.contiguous().view(torch.uint8).flatten(), bits, (len(words), whole.shape[1] * WORD // bits))
    return codes[:, :count]


def fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Likewise for codes that do not cross words: the last bits of a word are unused if `bits` does not divide 32."""
    if count > words.shape[1] * (WORD // bits):
        raise damaged(f"rows of {words.shape[1]} words hold no {count} codes of {bits} bits")
    shifts = torch.arange(0, WORD - bits + 1, bits, dtype=torch.int32)
    codes = (words[..., None] >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return codes.flatten(-2)[..., :count]


def stacked(packed: Tensor, bits: int, count: int, *, from_high: bool) -> Tensor:
    """The first `count` rows of codes, uint8 (count, C), from integers (R, C).

    Each integer holds codes of several rows that are R rows apart: the first in its low bits or, `from_high`, in the
    highest bits that its codes fill.
    """
    held = 8 * packed.itemsize // bits
    shifts = [bits * i for i in range(held)]
    ordered = shifts[::-1] if from_high else shifts
    return torch.cat([(packed >> shift & (1 << bits) - 1).to(torch.uint8) for shift in ordered])[:count]


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `stream`: words (R, W) int32 of codes (R, C); the last word of a row is filled with zeros."""
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % WORD))
    return pack(padded, bits).view(torch.int32).view(rows, -1)[:, : -(-columns * bits // WORD)].contiguous()
