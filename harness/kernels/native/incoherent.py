"""Lattice codes of weights that are rotated on both sides (QuIP#): transforms and product are one operator.

E8P is read from two tables of 256 magnitudes and 256 signs, 4 KiB that are the same for all weights; one table of all
65536 points, 512 KiB, is as fast where the second-level cache holds it. Transforms and sums are in float32; products of
many rows in bfloat16 round the transformed inputs to it.
"""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from torch import Tensor

from harness.core import QTensor
from harness.core.formats import lattice
from harness.core.formats.incoherent import IncoherentQTensor
from harness.core.formats.lattice import Codebook
from harness.core.hadamard import dense_factor
from harness.kernels.native import library
from harness.kernels.native.vectors import VectorKernel

_CPU = torch.device("cpu")


def supports(weight: QTensor, dtype: torch.dtype) -> TypeGuard[IncoherentQTensor]:
    """Whether the kernel runs this weight: inputs in float32 or bfloat16."""
    return isinstance(weight, IncoherentQTensor) and library.runs(dtype)


class IncoherentLinear(VectorKernel):
    """One weight (N, K), with a book for each stage.

    tables0, tables1            (512, 8) int8 of E8P, see `lattice.parts`; or points (256, 8) float32, in units of the
                                codebook
    scale                       (stages,) float32, the value of a unit
    left, right                 (N,), (K,) float16
    left_matrix, right_matrix   the dense factors of the transforms (order, order); None where there is none
    """

    name = "native_e8p"

    def __init__(self, weight: IncoherentQTensor) -> None:
        stages = zip(weight.codes, weight.books, strict=True)
        super().__init__(weight.shape, ((codes, book.bits, _table(book)) for codes, book in stages))
        steps = [book.step for book in weight.books]
        self.register_buffer("scale", weight.scale * torch.tensor(steps))
        for side, size in zip(("left", "right"), weight.shape, strict=True):
            self.register_buffer(side, weight.vector(side, torch.float16))
            self.register_buffer(f"{side}_matrix", _matrix(size, side == "left"))

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        stored = self._buffers  # attributes of a module are found more slowly
        outputs: Tensor = torch.ops.ptqbench_native.incoherent_linear.default(
            inputs,
            self.stored("codes"),
            self.stored("tables"),
            stored["scale"],
            stored["right"],
            stored["left"],
            stored["right_matrix"],
            stored["left_matrix"],
            bias,
        )
        return outputs


@functools.cache
def _table(book: Codebook) -> Tensor:
    """The points of a codebook, the same tensor for all weights."""
    return lattice.parts(_CPU) if book is lattice.E8P else book.table(_CPU).float()


@functools.cache
def _matrix(size: int, transposed: bool) -> Tensor | None:
    """The dense factor A of a transform as the operator reads it, x A; the same tensor for all weights."""
    factor = dense_factor(size)
    return None if factor is None else (factor.T if transposed else factor).float().contiguous()
