"""What weights of vectors share: books of codes, row by row, and tables, in the order in which vectors.h reads them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.kernels.base import Kernel

VECTOR = 8  # inputs of a vector
MOST_BOOKS = 8
_NARROW = 8  # bits of a code in one byte


def is_wide(code_bits: int) -> bool:
    """Whether codes of this width take two bytes."""
    return code_bits > _NARROW


class VectorKernel(Kernel):
    """One weight (N, K) of vectors, each the sum of one entry from the table of each book.

    codes0, ...   (N, K / 8) of each book: uint8, or int16 above 8 bits; a zero is added to an odd number of codes
    tables0, ...  (entries, 8)
    """

    def __init__(self, shape: tuple[int, int], books: Iterable[tuple[Tensor, int, Tensor]]) -> None:
        """`books` are codes (N, K / 8) of unsigned integers, their bits, and their table."""
        super().__init__(shape)
        self.count = 0
        for codes, bits, table in books:
            padded = F.pad(codes, (0, codes.shape[1] % 2))
            stored = padded.to(torch.int16 if is_wide(bits) else torch.uint8).contiguous()
            self.register_buffer(f"codes{self.count}", stored)
            self.register_buffer(f"tables{self.count}", table)
            self.count += 1

    def stored(self, name: str) -> list[Tensor]:
        """The `codes` or `tables` of all books."""
        return [self._buffers[f"{name}{i}"] for i in range(self.count)]  # type: ignore[misc]
