"""QuIP#'s format: lattice codes of a weight that is rotated on both sides.

    W = diag(left) Q_N V Q_K^T diag(right)    V = sum over stages of scale_i * point(codes_i), one code per 8 inputs

with Q of `hadamard` and signs left (N,), right (K,). A linear computes x W^T = ((x right) Q_K) V^T Q_N^T left: it
transforms the activations twice and never the weight.

Paper: Tseng et al. 2024, arXiv 2402.04396, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats import lattice
from harness.core.formats.additive import half
from harness.core.formats.packing import pack, unpack
from harness.core.formats.qtensor import QTensor, Tuner
from harness.core.hadamard import rotate, unrotate

# bits -> the codebook of each stage; the points of all stages are summed.
STAGES: dict[int, tuple[lattice.Codebook, ...]] = {
    2: (lattice.E8P,),
    3: (lattice.E8P, lattice.SMALL),
    4: (lattice.E8P, lattice.E8P),
}


class IncoherentQTensor(QTensor):
    """Codes of a rotated weight (N, K), K a multiple of 8.

    codes0, codes1   (N, K / 8) of the first and, at 3 and 4 bits, the second stage: int16 for E8P, uint8 for SMALL
    scale            (stages,) float32
    left, right      signs packed at 1 bit each; float16 vectors (N,), (K,) after fine-tuning
    """

    kernel: ClassVar[str] = "e8p"

    scale: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, codes: Sequence[Tensor], bits: int, scale: Tensor, left: Tensor, right: Tensor) -> None:
        """`codes` has one int32 tensor (N, K / 8) per stage of `bits`; `left` (N,) and `right` (K,) are signs."""
        super().__init__((len(left), len(right)))
        self.books = STAGES[bits]
        for i, (part, book) in enumerate(zip(codes, self.books, strict=True)):
            self.register_buffer(f"codes{i}", part.to(torch.int16 if book.bits > 8 else torch.uint8))
        self.register_buffer("scale", scale.float())
        self.register_buffer("left", pack((left < 0).to(torch.uint8), 1))
        self.register_buffer("right", pack((right < 0).to(torch.uint8), 1))

    @property
    def codes(self) -> list[Tensor]:
        return [buffer for name, buffer in self.named_buffers() if name.startswith("codes")]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        left, right = self.vector("left", exact), self.vector("right", exact)
        return self._unrotated(exact).mul_(right).mul_(left[:, None]).to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """y = x W^T + b by transforms of inputs and outputs, in float32 or wider because they sum many terms."""
        exact = torch.promote_types(inputs.dtype, torch.float32)
        rotated = rotate(inputs.to(exact) * self.vector("right", exact)).to(inputs.dtype)
        products = [F.linear(rotated, slab) for slab in self._slabs(inputs.dtype)]
        outputs = unrotate(torch.cat(products, -1).to(exact)) * (self.vector("left", exact) * self._step)
        return (outputs if bias is None else outputs + bias).to(inputs.dtype)

    def tuner(self) -> Tuner:
        """A tuner of `left` and `right` as real vectors; the codes do not change (section 5 of the paper)."""
        unrotated = self._unrotated(torch.float32)
        initial = {name: self.vector(name, torch.float32) for name in ("left", "right")}

        def weight(values: dict[str, Tensor]) -> Tensor:
            return values["left"][:, None] * unrotated * values["right"]

        def linear(values: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return F.linear(inputs * values["right"], unrotated) * values["left"]

        def accept(values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                self.register_buffer(name, half(value, name))

        return Tuner(initial, weight, accept, linear)

    def vector(self, name: str, dtype: torch.dtype) -> Tensor:
        """`left` or `right` as numbers."""
        stored, count = self.get_buffer(name), self.shape[name == "right"]
        if stored.is_floating_point():
            return stored.to(dtype)
        return 1 - 2 * unpack(stored, 1, (count,)).to(dtype)

    def _unrotated(self, dtype: torch.dtype) -> Tensor:
        """Q_N V Q_K^T, (N, K)."""
        rows = unrotate(torch.cat(list(self._slabs(dtype))).mul_(self._step))
        return unrotate(rows.T).T.contiguous()

    @property
    def _step(self) -> Tensor:
        """Value of one unit of the first codebook's table in V, ()."""
        return self.scale[0] * self.books[0].step

    def _slabs(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """V in units of `_step`, one slab of rows at a time."""
        height = self._slab_rows()
        first, *later_books = self.books
        codes, *later_codes = self.codes
        factors = [book.step * scale / self._step for book, scale in zip(later_books, self.scale[1:], strict=True)]
        for start in range(0, self.shape[0], height):
            slab = slice(start, start + height)
            values = first.decode(codes[slab]).flatten(1).to(dtype)
            for book, stage_codes, factor in zip(later_books, later_codes, factors, strict=True):
                values += book.decode(stage_codes[slab]).flatten(1).to(dtype) * factor.to(dtype)
            yield values
