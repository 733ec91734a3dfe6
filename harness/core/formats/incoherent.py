"""QuIP#'s format: lattice codes of a weight that is rotated on both sides.

    V = sum over stages of scale_i * point(codes_i), one code per 8 inputs; V is that of `rotated_codes`

Paper: Tseng et al. 2024, arXiv 2402.04396, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from harness.core.formats import lattice
from harness.core.formats.rotated_codes import RotatedQTensor

# bits -> the codebook of each stage; the points of all stages are summed.
STAGES: dict[int, tuple[lattice.Codebook, ...]] = {
    2: (lattice.E8P,),
    3: (lattice.E8P, lattice.SMALL),
    4: (lattice.E8P, lattice.E8P),
}


class IncoherentQTensor(RotatedQTensor):
    """Codes of a rotated weight (N, K), K a multiple of 8.

    codes0, codes1   (N, K / 8) of the first and, at 3 and 4 bits, the second stage: int16 for E8P, uint8 for SMALL
    scale            (stages,) float32
    """

    kernel: ClassVar[str] = "e8p"

    scale: Tensor

    def __init__(self, codes: Sequence[Tensor], bits: int, scale: Tensor, left: Tensor, right: Tensor) -> None:
        """`codes` has one int32 tensor (N, K / 8) per stage of `bits`; `left` (N,) and `right` (K,) are signs."""
        super().__init__(left, right)
        self.books = STAGES[bits]
        for i, (part, book) in enumerate(zip(codes, self.books, strict=True)):
            self.register_buffer(f"codes{i}", part.to(torch.int16 if book.bits > 8 else torch.uint8))
        self.register_buffer("scale", scale.float())

    @property
    def codes(self) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if name.startswith("codes")]

    @property
    def step(self) -> Tensor:
        return self.scale[0] * self.books[0].step

    def slabs(self, dtype: torch.dtype) -> Iterator[Tensor]:
        height = self._slab_rows()
        first, *later_books = self.books
        codes, *later_codes = self.codes
        factors = [book.step * scale / self.step for book, scale in zip(later_books, self.scale[1:], strict=True)]
        for start in range(0, self.shape[0], height):
            slab = slice(start, start + height)
            values = first.decode(codes[slab]).flatten(1).to(dtype)
            for book, stage_codes, factor in zip(later_books, later_codes, factors, strict=True):
                values += book.decode(stage_codes[slab]).flatten(1).to(dtype) * factor.to(dtype)
            yield values
