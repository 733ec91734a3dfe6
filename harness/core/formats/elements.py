"""Small floats: a sign, an exponent and a mantissa in 3 to 8 bits, as codes of number formats and as scales.

Elements and their names are those of the OCP 8-bit floating point specification 1.0 and the OCP microscaling formats
(MX) specification 1.0: subnormal numbers, a bias of 2^(exponent bits - 1) - 1, no infinities. Of 8 bits, the largest
code of each sign is NaN (E4M3); E5M2 follows IEEE 754, whose largest exponent is for infinities and NaN. Values beyond
the largest become the largest. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

KNOWN = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_EXPONENTS = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}


@dataclass(frozen=True)
class Element:
    """A float of 1 + `exponent` + `mantissa` bits. Codes are as in the specification: sign, exponent, mantissa."""

    exponent: int
    mantissa: int

    @property
    def name(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of torch that has these codes; None if there is none of one value a byte."""
        return _DTYPES.get(self.name)

    @property
    def bias(self) -> int:
        return (1 << self.exponent - 1) - 1

    @property  # not cached: torch.compile cannot trace the lock of cached_property
    def largest(self) -> float:
        """The largest value."""
        if self.name == "e5m2":
            return (2 - 2.0**-self.mantissa) * 2.0**self.bias
        missing = 2 if self.bits == 8 else 1  # the last code of a sign is NaN
        return (2 - missing * 2.0**-self.mantissa) * 2.0 ** ((1 << self.exponent) - 1 - self.bias)

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest power of two that is a value."""
        return math.frexp(self.largest)[1] - 1

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def step(self) -> float:
        """The smallest value above 0."""
        return self.smallest_normal * 2.0**-self.mantissa

    def round_(self, values: Tensor) -> Tensor:
        """Round float32 or float64 `values` in place; NaN stays NaN."""
        values.clamp_(-self.largest, self.largest)
        spacing = power_of_two(values).mul_(2.0**-self.mantissa).clamp_(min=self.step)
        return values.div_(spacing).round_().mul_(spacing)

    def encode(self, values: Tensor) -> Tensor:
        """Codes (uint8) of `values` that are exact values of this element."""
        magnitude = values.abs().float()
        places = 23 - self.mantissa  # between the last bits of both mantissas
        normal = (magnitude.view(torch.int32) >> places) - (127 - self.bias << self.mantissa)
        subnormal = (magnitude / self.step).to(torch.int32)
        codes = torch.where(magnitude < self.smallest_normal, subnormal, normal)
        return (codes | torch.signbit(values).int() << self.bits - 1).to(torch.uint8)

    def cast(self, values: Tensor) -> Tensor:
        """The values that `round_` gives, in torch's dtype of this element; changes the float32 `values`."""
        assert self.dtype is not None
        return values.clamp_(-self.largest, self.largest).to(self.dtype)

    @functools.cached_property
    def levels(self) -> Tensor:
        """The value of each code, (2^bits,) float32; NaN for codes that are no finite value."""
        codes = torch.arange(1 << self.bits - 1)
        exponent, mantissa = codes >> self.mantissa, codes % (1 << self.mantissa)
        subnormal = mantissa * self.step
        normal = (1 + mantissa * 2.0**-self.mantissa) * torch.exp2((exponent - self.bias).double())
        magnitudes = torch.where(exponent == 0, subnormal, normal).float()
        magnitudes[magnitudes > self.largest] = torch.nan
        return torch.cat([magnitudes, -magnitudes])


@functools.cache
def element(name: str) -> Element:
    """The element called `name`: e2m1 has two bits of exponent and one of mantissa.

    Raises: ValueError for a name that is none, or a width that is not from 3 to 8 bits.
    """
    digits = re.fullmatch(r"e([1-6])m([1-6])", name)
    if digits is not None:
        found = Element(*map(int, digits.groups()))
        if 3 <= found.bits <= 8:
            return found
    raise ValueError(
        f"element={name} is no float of 3 to 8 bits; expected e and the bits of the exponent, m and those of the "
        f"mantissa, such as {', '.join(KNOWN)}"
    )


def power_of_two(values: Tensor) -> Tensor:
    """The largest power of two up to each magnitude of float32 or float64 `values`; 0 for 0 and subnormal numbers."""
    integers, mask = _EXPONENTS[values.dtype]
    return (values.view(integers) & mask).view(values.dtype)
