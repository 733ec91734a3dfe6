"""Additive codebooks (AQLM) with vectors of 8 inputs.

Up to 8 bits, the codebooks are in float32 and stay in the first-level cache; wider ones are in float16, as stored, and
are widened where they are read. Sums are in float32; the scale multiplies them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import QTensor
from harness.core.formats.additive import AdditiveQTensor
from harness.kernels.base import Kernel
from harness.kernels.native import library
from harness.kernels.native.vectors import DTYPES, MOST_BOOKS, VECTOR, pack_rows

_NARROW = 8  # bits of a code in one byte


def supports(weight: QTensor, dtype: torch.dtype) -> bool:
    """Whether the kernel runs this weight: vectors of 8, at most 8 codebooks, inputs in float32 or bfloat16."""
    if not isinstance(weight, AdditiveQTensor) or dtype not in DTYPES or not library.available():
        return False
    return weight.group_size == VECTOR and len(weight.codebooks) <= MOST_BOOKS


class AdditiveLinear(Kernel):
    """One weight (N, K).

    codes0, ...   (N, K / 8) of each codebook: uint8, or int16 above 8 bits; a zero is added to an odd number of codes
    tables0, ...  (entries, 8): float32, or float16 above 8 bits
    scale         (N,) float32
    """

    name = "native_additive"

    scale: Tensor

    def __init__(self, weight: AdditiveQTensor) -> None:
        super().__init__(weight.shape)
        self.books = len(weight.codebooks)
        wide, codes = weight.code_bits > _NARROW, weight.codes
        for i, codebook in enumerate(weight.codebooks):
            self.register_buffer(f"codes{i}", pack_rows(codes[:, i].T, wide))
            self.register_buffer(f"tables{i}", codebook.clone() if wide else codebook.float())
        self.register_buffer("scale", weight.scale.float())

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        stored = self._buffers  # attributes of a module are found more slowly
        codes, tables = ([stored[f"{name}{i}"] for i in range(self.books)] for name in ("codes", "tables"))
        outputs: Tensor = torch.ops.ptqbench_native.additive_linear.default(
            inputs, codes, tables, stored["scale"], bias, self.shape[0]
        )
        return outputs
