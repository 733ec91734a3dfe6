"""Block rotation: multiply each block of a linear's inputs by a Hadamard matrix, so that outliers share their block.

Paper: Egiazarian et al. 2025, "Bridging the Gap Between Promise and Performance for Microscaling FP4 Quantization"
    (MR-GPTQ), arXiv 2509.23202: x H and W H with a block diagonal H of the size of the groups of MXFP4 or a multiple of
    it, then GPTQ. A group of E2M1 codes with a power of two as its scale gains much, one of NVFP4 little.
Differs: the transform of the inputs is an operator of its own, before their quantization; the authors fuse both. GPTQ
    orders columns over the whole row, with `static_groups`, as the authors do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from harness.core import Method, hadamard
from harness.core.rotated import Rotated


@dataclass(frozen=True, kw_only=True)
class RotateBlock(Method):
    """Rotates the inputs of each linear in blocks, and rounds to nearest unless a later method quantizes.

    size  consecutive inputs that are rotated together, a power of two; the record calls the linears NAME.linear
    """

    size: int = 32

    def __post_init__(self) -> None:
        if self.size < 2 or self.size & (self.size - 1):
            raise ValueError(f"size={self.size} is no power of two; expected 16, 32, 64 or 128")

    def prepare(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            if weight.shape[1] % self.size:
                raise ValueError(
                    f"size={self.size} does not divide in_features={weight.shape[1]} of {name}; use a divisor, or skip"
                )
            weight.copy_(hadamard.rotate(weight.double(), self.size))
            model.set_submodule(name, Rotated(model.get_submodule(name), self.size))
