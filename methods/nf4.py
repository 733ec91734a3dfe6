"""4-bit tables of levels: NormalFloat quantiles, and 4-bit floats; rounded to nearest.

Paper: QLoRA, Dettmers et al. 2023, arXiv 2305.14314: NF4 of section 3 and appendix E, its baseline FP4, and double
    quantization of the blocks' scales.
Differs: FP4 is not the common e2m1 but the format of the authors' library (bitsandbytes), see
    `harness.core.formats.tables`. Double quantization also follows the library: the mean of the scales is subtracted
    first, and 256 scales share a second scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.core import LevelsWeight, Method, Scheme


@dataclass(frozen=True, kw_only=True)
class Rounded(Method):
    """Base of NF4 and FP4: rounding to nearest, whose scheme is the table; no calibration data."""

    table: ClassVar[str]

    def check(self, scheme: Scheme) -> None:
        fmt = scheme.weight
        if not isinstance(fmt, LevelsWeight) or fmt.table != self.table:
            raise ValueError(f"scheme={scheme.name} is another format than {self.table}; use scheme={self.table}")


@dataclass(frozen=True, kw_only=True)
class NF4(Rounded):
    """Levels at quantiles of a normal distribution: 7 negative levels, zero, and 8 positive levels."""

    table: ClassVar[str] = "nf4"


@dataclass(frozen=True, kw_only=True)
class FP4(Rounded):
    """4-bit floats: one sign bit, two exponent bits, one mantissa bit; code 8 is negative zero."""

    table: ClassVar[str] = "fp4"
