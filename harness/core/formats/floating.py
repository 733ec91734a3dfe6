"""Small floats with shared scales: FP8, and the block formats MXFP8, MXFP6, MXFP4 and NVFP4.

For a group of values with largest magnitude a, an element with largest value M and largest power of two 2^E:

    float scale          s = a / M
    E8M0 scale, floor    s = 2^(floor(log2 a) - E)       OCP microscaling formats (MX) specification 1.0, section 6.3
    E8M0 scale, ceil     s = 2^ceil(log2(a / M))         no value is clipped
    E4M3 scale           s = E4M3(a / M / t) with t = max a / (448 M) over the whole tensor (NVFP4), or t = 1

    value' = element(value / (s t)) s t

`scale_search` tries other scales, those of a times a few factors, and keeps the one with the least squared error of its
group: `mse` the neighbours of each scale, `four_over_six` one at which a becomes 4 (Cook et al. 2025, arXiv 2512.02010:
E2M1 has no value between 4 and 6), with 256 in the place of 448, so that the larger scale is an E4M3.

`top` takes the place of M in these formulas: the multiple of the scale that a becomes. A top above M clips the largest
values, and gives all others finer steps. With a t, values are multiplied by (1 / t) / s, as in torchao's
`nvfp4_quantize`, whose codes are therefore the same to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core.formats import scales
from harness.core.formats.elements import Element, element, power_of_two
from harness.core.formats.format import Format
from harness.core.formats.params import Params

_SCALES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "e8m0": torch.float8_e8m0fnu,
    "e4m3": torch.float8_e4m3fn,
}
_E4M3 = element("e4m3")
_LARGEST_POWER = 2.0**127  # of E8M0, whose smallest is 2^-127

# Factors of the range of a group with which a search tries other scales: the next ones that can be stored.
FACTORS = {
    "e8m0": (0.5, 2.0),
    "e4m3": (1.5, 1.375, 1.25, 1.125, *(1 - i / 16 for i in range(1, 9))),
    "bfloat16": scales.SHRUNK,
    "float32": scales.SHRUNK,
}
_FOUR_OVER_SIX = 6 / 4


@dataclass(frozen=True, kw_only=True)
class FloatFormat(Format):
    """Elements with a scale for each group of values.

    element       e4m3, e2m1, ...: bits of exponent and mantissa
    scale_dtype   how scales are stored: floats, powers of two (e8m0), or 8-bit floats (e4m3)
    scale_rule    floor or ceil, of the exponent of an e8m0 scale
    top           the multiple of its scale that the largest value of a group becomes; None: the element's largest value
    tensor_scale  whether the whole tensor has one more scale, in float32, so that e4m3 scales cover any range
    scale_search  whether other scales than that of the range are tried: none, mse, or four_over_six (e2m1 alone)
    """

    element: str
    scale_dtype: Literal["float32", "bfloat16", "e8m0", "e4m3"] = "float32"
    scale_rule: Literal["floor", "ceil"] = "floor"
    top: float | None = None
    tensor_scale: bool = False
    scale_search: Literal["none", "mse", "four_over_six"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = element(self.element).largest
        if self.scale_rule != "floor" and self.scale_dtype != "e8m0":
            raise ValueError(
                f"scale_rule={self.scale_rule} has no use with scale_dtype={self.scale_dtype}; set scale_dtype=e8m0, "
                "or scale_rule=floor"
            )
        if self.top is not None and not (0 < self.top <= 2 * largest):
            raise ValueError(f"top={self.top:g} is out of range; expected more than 0, up to {2 * largest:g}, or null")
        if self.top is not None and self.scale_dtype == "e8m0" and self.scale_rule == "floor":
            raise ValueError(f"top={self.top:g} has no use with scale_rule=floor; set scale_rule=ceil, or top=null")
        if self.tensor_scale and self.scale_dtype != "e4m3":
            raise ValueError(
                f"tensor_scale=true has no use with scale_dtype={self.scale_dtype}; set scale_dtype=e4m3, or "
                "tensor_scale=false"
            )
        if self.scale_search == "four_over_six" and (self.element, self.scale_dtype) != ("e2m1", "e4m3"):
            raise ValueError(
                f"scale_search=four_over_six has no use with element={self.element} and scale_dtype="
                f"{self.scale_dtype}; expected e2m1 and e4m3"
            )

    @property
    def kind(self) -> Element:
        """The element."""
        return element(self.element)

    @property
    def bits(self) -> int:
        return self.kind.bits

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return self.element

    @property
    def scale_storage(self) -> torch.dtype:
        """The dtype in which scales are stored."""
        return _SCALES[self.scale_dtype]

    @property
    def covered(self) -> float:
        """The multiple of its scale that the largest value of a group becomes, unless the scale is a power of two."""
        return self.kind.largest if self.top is None else self.top

    def whole(self, values: Tensor) -> Tensor | None:
        return self.tensor_factor(values.abs().amax()) if self.tensor_scale else None

    def tensor_factor(self, absmax: Tensor) -> Tensor:
        """The factor of tensors whose largest magnitude is `absmax`, exact in float32; 1 for a tensor of zeros."""
        largest = _E4M3.largest if self.scale_search != "four_over_six" else 256.0
        factor = (absmax.float() / (largest * self.covered)).to(absmax.dtype)
        return torch.where(factor > 0, factor, 1)

    def cover(self, low: Tensor, high: Tensor, whole: Tensor | None = None) -> Params:
        absmax = torch.maximum(high, -low)
        if self.scale_dtype == "e8m0":
            return Params(self._power(absmax))
        scale = absmax / self.covered
        if self.scale_dtype == "e4m3":
            scale = scale if whole is None else scale / whole
            return Params(_E4M3.round_(scale.clamp(min=_E4M3.smallest_normal)), whole=whole)
        scale = torch.where(scale > 0, scale, 1)
        if scale.dtype == self.scale_storage:  # nothing to round, and no check for which a GPU would wait
            return Params(scale)
        return Params(scales.store(scale, self.scale_dtype, self.where))

    @property
    def factors(self) -> tuple[float, ...]:
        """Factors of a group's range with which a search tries other scales."""
        return (_FOUR_OVER_SIX,) if self.scale_search == "four_over_six" else FACTORS[self.scale_dtype]

    @property
    def shrinks(self) -> list[list[tuple[float, float]]]:
        return [[(factor, factor) for factor in self.factors]]

    def params(self, groups: Tensor, whole: Tensor | None = None) -> Params:
        low, high = groups.amin(-1), groups.amax(-1)
        best = self.cover(low, high, whole)
        if self.scale_search == "none":
            return best
        error = self._squared_error(groups, best)
        for factor in self.factors:
            trial = self.cover(low * factor, high * factor, whole)
            trial_error = self._squared_error(groups, trial)
            best, error = trial.where(trial_error < error, best), torch.minimum(trial_error, error)
        return best

    def _squared_error(self, groups: Tensor, params: Params) -> Tensor:
        return self.snap(groups, params.spread()).sub_(groups).square_().sum(-1)

    def encode(self, values: Tensor, params: Params) -> Tensor:
        return self.kind.encode(self._elements(values, params))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        levels = self.kind.levels.to(device=codes.device, dtype=params.scale.dtype)
        return levels.index_select(0, codes.reshape(-1).int()).view(codes.shape).mul_(factor_of(params))

    def snap(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        return self._elements(values, params, out).mul_(factor_of(params))

    def cast(self, values: Tensor, params: Params) -> Tensor:
        """Nearest elements of float32 `values` in torch's dtype of the element, which must have one."""
        return self.kind.cast(self._scaled(values, params))

    def _elements(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        """The nearest element of each value, as a float."""
        return self.kind.round_(self._scaled(values, params, out))

    def _scaled(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        """The values in units of their scale."""
        if params.whole is None:
            return torch.div(values, params.scale, out=out)
        return torch.mul(values, params.whole.reciprocal() / params.scale, out=out)

    def _power(self, absmax: Tensor) -> Tensor:
        if self.scale_rule == "floor":
            power = power_of_two(absmax) * 2.0**-self.kind.largest_exponent
        else:
            exact = absmax / self.covered
            power = power_of_two(exact)
            power = torch.where(exact > power, 2 * power, power)
        return power.clamp(1 / _LARGEST_POWER, _LARGEST_POWER)


def factor_of(params: Params) -> Tensor:
    """What an element is multiplied by, in the shape of the scale."""
    return params.scale if params.whole is None else params.scale * params.whole
