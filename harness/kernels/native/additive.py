"""Additive codebooks (AQLM) with vectors of 8 inputs.

Up to 8 bits, the codebooks are in float32 and stay in the first-level cache; wider ones are in float16, as stored, and
are widened where they are read. Sums are in float32; the scale multiplies them.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from harness.core import QTensor
from harness.core.formats.additive import AdditiveQTensor
from harness.kernels.native import library
from harness.kernels.native.vectors import MOST_BOOKS, VECTOR, VectorKernel, is_wide


def supports(weight: QTensor, dtype: torch.dtype) -> TypeGuard[AdditiveQTensor]:
    """Whether the kernel runs this weight: vectors of 8, at most 8 codebooks, inputs in float32 or bfloat16."""
    if not isinstance(weight, AdditiveQTensor) or not library.runs(dtype):
        return False
    return weight.group_size == VECTOR and len(weight.codebooks) <= MOST_BOOKS


class AdditiveLinear(VectorKernel):
    """One weight (N, K); the tables are the codebooks, in float32, or float16 above 8 bits.

    scale  (N,) float32
    """

    name = "native_additive"

    scale: Tensor

    def __init__(self, weight: AdditiveQTensor) -> None:
        bits, codes = weight.code_bits, weight.codes
        tables = (book.clone() if is_wide(bits) else book.float() for book in weight.codebooks)
        super().__init__(weight.shape, ((codes[:, i].T, bits, table) for i, table in enumerate(tables)))
        self.register_buffer("scale", weight.scale.float())

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        outputs: Tensor = torch.ops.ptqbench_native.additive_linear.default(
            inputs, self.stored("codes"), self.stored("tables"), self._buffers["scale"], bias, self.shape[0]
        )
        return outputs
