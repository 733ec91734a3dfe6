"""A weight between two random rotations, as lattice codes: QuIP#'s format.

    W = diag(left) Q_N V Q_K^T diag(right)    V = sum over stages of scale_i * point(codes_i), eight inputs a code

with Q of `hadamard` and signs left (N,), right (K,). A linear computes x W^T = ((x right) Q_K) V^T Q_N^T left: two
transforms of the activations instead of one of the weight.

Paper: Tseng et al. 2024, arXiv 2402.04396, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import e8
from harness.core.hadamard import rotate, unrotate
from harness.core.packing import pack, unpack
from harness.core.qtensor import QTensor, Tuner

# Width in bits -> the codebooks whose points are summed.
STAGES: dict[int, tuple[e8.Codebook, ...]] = {2: (e8.E8P,), 3: (e8.E8P, e8.SMALL), 4: (e8.E8P, e8.E8P)}


class IncoherentQTensor(QTensor):
    """Codes of a rotated weight (N, K), K a multiple of 8.

    codes0, codes1   (N, K / 8) of the first and, at 3 and 4 bits, the second stage: int16 for E8P, uint8 for the small
    scale            (stages,) float32
    left, right      the signs, a bit each, or as float16 vectors (N,), (K,) once they were fine-tuned
    """

    kernel: ClassVar[str] = "e8p"

    scale: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, codes: Sequence[Tensor], bits: int, scale: Tensor, left: Tensor, right: Tensor) -> None:
        """`codes` are int32 (N, K / 8), one for each of the stages of `bits`; `left` (N,) and `right` (K,) signs."""
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
        left, right = self._vector("left", exact), self._vector("right", exact)
        return self._turned_back(exact).mul_(right).mul_(left[:, None]).to(dtype)

    def linear(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """The transforms are of the inputs and outputs, in float32 for narrower ones: their sums are of many terms."""
        exact = torch.promote_types(inputs.dtype, torch.float32)
        turned = rotate(inputs.to(exact) * self._vector("right", exact)).to(inputs.dtype)
        products = [F.linear(turned, slab) for slab in self._slabs(inputs.dtype)]
        found = unrotate(torch.cat(products, -1).to(exact)) * (self._vector("left", exact) * self._step)
        return (found if bias is None else found + bias).to(inputs.dtype)

    def tuner(self) -> Tuner:
        """Trains both vectors as real numbers; the codes stay (section 5 of the paper)."""
        between = self._turned_back(torch.float32)
        values = {name: self._vector(name, torch.float32) for name in ("left", "right")}

        def weight(given: dict[str, Tensor]) -> Tensor:
            return given["left"][:, None] * between * given["right"]

        def linear(given: dict[str, Tensor], inputs: Tensor) -> Tensor:
            return F.linear(inputs * given["right"], between) * given["left"]

        def accept(given: dict[str, Tensor]) -> None:
            for name, value in given.items():
                self.register_buffer(name, value.to(torch.float16))

        return Tuner(values, weight, accept, linear)

    def _vector(self, name: str, dtype: torch.dtype) -> Tensor:
        stored, count = self.get_buffer(name), self.shape[name == "right"]
        if stored.is_floating_point():
            return stored.to(dtype)
        return 1 - 2 * unpack(stored, 1, (count,)).to(dtype)

    def _turned_back(self, dtype: torch.dtype) -> Tensor:
        """Q_N V Q_K^T, (N, K)."""
        rows = unrotate(torch.cat(list(self._slabs(dtype))).mul_(self._step))
        return unrotate(rows.T).T.contiguous()

    @property
    def _step(self) -> Tensor:
        """What one unit of the first codebook's table stands for, ()."""
        return self.scale[0] * self.books[0].step

    def _slabs(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """V in units of `_step`, a slab of rows at a time."""
        height = self._slab_rows()
        first, *rest = self.books
        codes, *more = self.codes
        shares = [book.step * scale / self._step for book, scale in zip(rest, self.scale[1:], strict=True)]
        for start in range(0, self.shape[0], height):
            slab = slice(start, start + height)
            values = first.decode(codes[slab]).flatten(1).to(dtype)
            for book, part, share in zip(rest, more, shares, strict=True):
                values += book.decode(part[slab]).flatten(1).to(dtype) * share.to(dtype)
            yield values
