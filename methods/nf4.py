"""4-bit codebooks in blocks over the flattened weight: NormalFloat quantiles, and 4-bit floats.

Paper: QLoRA, Dettmers et al. 2023, arXiv 2305.14314: NF4 of section 3 and appendix E, FP4 as its baseline, and double
    quantization of the blocks' scales.
Differs: FP4 is not the common e2m1 but the one of the authors' library (bitsandbytes), whose exponent counts
    downwards and whose one subnormal is 1/192 of the largest value. The second scales' blocks of 256 and the mean that
    is taken off first are the library's too. Weights of any float type are quantized from their float32 values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core.codebook import BITS, LevelsQTensor
from harness.core.method import Method
from harness.core.qtensor import QTensor
from harness.core.ranges import at_least
from harness.core.scheme import Scheme, require_native
from harness.core.stats import Stats

# Outermost probability: between those that would leave 1/32 and 1/30 outside. Rounded as in the authors' code.
_OUTERMOST = 0.9677083
_BIAS = 3  # of FP4's exponent


@dataclass(frozen=True, kw_only=True)
class Codebook(Method, ABC):
    """Base of both: data free, 4 bits, in a format of its own.

    double_quant  store the blocks' scales in 8 bits
    block_size    weights that share a scale
    """

    label: ClassVar[str]

    double_quant: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        at_least(self, 1, "block_size")

    @staticmethod
    @abstractmethod
    def levels() -> Tensor:
        """The codebook (16,) in float32, by code, with the largest magnitude 1."""

    def check(self, scheme: Scheme) -> None:
        require_native(scheme, f"the blocks of {self.label}")
        if scheme.weight.bits != BITS:
            raise ValueError(f"bits={scheme.weight.bits} is not what {self.label} has; use bits={BITS}")

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        return LevelsQTensor(weight, self.levels().to(weight.device), self.block_size, self.double_quant)


@dataclass(frozen=True, kw_only=True)
class NF4(Codebook):
    """Levels at quantiles of a normal distribution: 7 below zero, zero, and 8 above."""

    label: ClassVar[str] = "nf4"

    @staticmethod
    def levels() -> Tensor:
        levels = torch.cat([-_quantiles(7), torch.zeros(1), _quantiles(8).flip(0)])
        return levels / levels.max()


@dataclass(frozen=True, kw_only=True)
class FP4(Codebook):
    """A sign, two bits of exponent and one of mantissa; code 8 is a negative zero."""

    label: ClassVar[str] = "fp4"

    @staticmethod
    def levels() -> Tensor:
        levels = torch.tensor([_float4(code) for code in range(1 << BITS)], dtype=torch.float64)
        return (levels / levels.max()).float()


def _quantiles(count: int) -> Tensor:
    """Quantiles of the standard normal distribution, in `count` even steps from the outermost share towards 1/2."""
    share = torch.linspace(_OUTERMOST, 0.5, count + 1)[:-1]
    found: Tensor = torch.special.ndtri(share.double())
    return found.float()


def _float4(code: int) -> float:
    """What the fields of a code say: its exponent is subtracted, and 0 there is a subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = (1 + mantissa / 2) * 2.0 ** (_BIAS + 1 - exponent) if exponent else mantissa / 2 * 2.0**-_BIAS
    return -size if sign else size
