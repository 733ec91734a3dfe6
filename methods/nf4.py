"""4-bit codebooks in blocks over the flattened weight: NormalFloat quantiles, and 4-bit floats.

Paper: QLoRA, Dettmers et al. 2023, arXiv 2305.14314: NF4 of section 3 and appendix E, its baseline FP4, and double
    quantization of the blocks' scales.
Differs: FP4 is not the common e2m1 but the format of the authors' library (bitsandbytes): larger exponent fields mean
    smaller values, and its only subnormal is 1/192 of the largest value. Double quantization also follows the
    library: the mean of the scales is subtracted first, and 256 scales share a second scale. Weights of any float type
    are quantized from their float32 values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.core import Method, QTensor, Scheme, Stats, at_least, require_native
from harness.core.formats import LevelsQTensor
from harness.core.formats.codebook import BITS

# Probability of the outermost quantile: the mean of 1 - 1/32 and 1 - 1/30, rounded as in the authors' code.
_OUTERMOST = 0.9677083
_BIAS = 3  # exponent bias of FP4


@dataclass(frozen=True, kw_only=True)
class Codebook(Method, ABC):
    """Base of NF4 and FP4: 4 bits, a native format, no calibration data.

    double_quant  store the blocks' scales in 8 bits
    block_size    consecutive values of the flattened weight that share a scale
    """

    label: ClassVar[str]

    double_quant: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        at_least(self, 1, "block_size")

    @staticmethod
    @abstractmethod
    def levels() -> Tensor:
        """Return the codebook (16,) float32, indexed by code, with largest magnitude 1."""

    def check(self, scheme: Scheme) -> None:
        require_native(scheme, f"the blocks of {self.label}")
        if scheme.weight.bits != BITS:
            raise ValueError(
                f"bits={scheme.weight.bits} does not match {self.label}, which has {BITS} bits; use bits={BITS}"
            )

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        return LevelsQTensor(weight, self.levels().to(weight.device), self.block_size, self.double_quant)


@dataclass(frozen=True, kw_only=True)
class NF4(Codebook):
    """Levels at quantiles of a normal distribution: 7 negative levels, zero, and 8 positive levels."""

    label: ClassVar[str] = "nf4"

    @staticmethod
    def levels() -> Tensor:
        levels = torch.cat([-_quantiles(7), torch.zeros(1), _quantiles(8).flip(0)])
        return levels / levels.max()


@dataclass(frozen=True, kw_only=True)
class FP4(Codebook):
    """4-bit float: one sign bit, two exponent bits, one mantissa bit; code 8 is negative zero."""

    label: ClassVar[str] = "fp4"

    @staticmethod
    def levels() -> Tensor:
        levels = torch.tensor([_float4(code) for code in range(1 << BITS)], dtype=torch.float64)
        return (levels / levels.max()).float()


def _quantiles(count: int) -> Tensor:
    """Return quantiles (count,) float32 of the standard normal distribution, in decreasing order.

    Their probabilities are evenly spaced from _OUTERMOST towards 1/2, without 1/2 itself, which is the level zero.
    """
    probabilities = torch.linspace(_OUTERMOST, 0.5, count + 1)[:-1]
    quantiles: Tensor = torch.special.ndtri(probabilities.double())
    return quantiles.float()


def _float4(code: int) -> float:
    """Decode a 4-bit float: the exponent field is subtracted from the bias, and exponent 0 is a subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (_BIAS + 1 - exponent) if exponent else mantissa / 2 * 2.0**-_BIAS
    return -magnitude if sign else magnitude
