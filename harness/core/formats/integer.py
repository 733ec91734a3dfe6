"""The uniform integer grid.

For codes 0 .. Q with Q = 2^bits - 1 (so Qmin = 0, Qmax = Q), and a group of values with range [min, max],
which is widened to include 0.0 if the zero point is an integer:

    asymmetric        scale = (max - min) / Q                zero_point = clip(round(-min / scale), 0, Q)
      float zero      scale = (max - min) / Q                zero_point = -min / scale
    symmetric full    scale = 2 absmax / Q                   zero_point = 2^(bits - 1)
    symmetric narrow  scale = absmax / (2^(bits - 1) - 1)    zero_point = 2^(bits - 1)

    code = clip(round(value / scale + zero_point), 0, Q)     value' = (code - zero_point) * scale

Symmetric formats add the zero point after rounding, which gives the same code unless the sum is inexact in float32.
`full` is GPTQ's symmetric grid (IST-DASLab/gptq quant.py), `narrow` that of AWQ and SmoothQuant. Rounding is
to nearest, ties to even. Scales are rounded to their stored dtype before any code is chosen, so that codes are
optimised for the stored scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core.formats import scales
from harness.core.formats.format import Format
from harness.core.formats.params import Params
from harness.core.formats.scales import ScaleDtype

_ALONE = (1.05, 0.95, 0.9, 0.85)  # factors of one end of a range, after both ends shrank together


@dataclass(frozen=True, kw_only=True)
class IntFormat(Format):
    """Integer codes 0 .. 2^bits - 1 on a uniform grid: value = (code - zero_point) * scale.

    `grid` and `zero_point` decide how scale and zero point are computed from the range of values, see above. Only
    symmetric formats use `grid`, only asymmetric formats use `zero_point` and have one in their parameters.
    """

    bits: int
    symmetric: bool = False
    grid: Literal["full", "narrow"] = "full"
    zero_point: Literal["integer", "float"] = "integer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is out of range; expected 2 to 8")
        if self.grid != "full" and not self.symmetric:
            raise ValueError(f"grid={self.grid} has no use with symmetric=false; set symmetric=true, or grid=full")
        if self.zero_point != "integer" and self.symmetric:
            raise ValueError(f"zero_point={self.zero_point} has no use with symmetric=true; set symmetric=false")

    @property
    def label(self) -> str:
        return f"int{self.bits}"

    @property
    def shrinks(self) -> list[list[tuple[float, float]]]:
        together = [(share, share) for share in scales.SHRUNK]
        if self.symmetric:
            return [together]
        return [together, [(share, 1.0) for share in _ALONE], [(1.0, share) for share in _ALONE]]

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The fixed zero point of a symmetric format."""
        return 1 << (self.bits - 1)

    @property
    def steps(self) -> float:
        """Code steps from 0.0 to the largest magnitude that a symmetric format covers."""
        return self.max_code / 2 if self.grid == "full" else self.mid_code - 1

    def cover(self, low: Tensor, high: Tensor, whole: Tensor | None = None) -> Params:
        """Scale > 0 and zero point of groups with the ranges [low, high], in the dtype of the ranges.

        A group of zeros gets scale 1.
        """
        scale = _positive(self.exact_scale(low, high))
        return Params(scale) if self.symmetric else Params(scale, self._zero_point(low, scale))

    def symmetric_scale(self, absmax: Tensor) -> Tensor:
        """Scale of groups whose largest magnitude is `absmax`, in the same shape and dtype; 1 for a group of zeros."""
        return _positive(absmax / self.steps)

    def encode(self, values: Tensor, params: Params) -> Tensor:
        if params.zero_point is None:
            codes = self.encode_centred(values, params.scale)
            return codes.add_(self.mid_code).view(torch.uint8)  # int8 must wrap around here
        return (values / params.scale).add_(params.zero_point).round_().clamp_(0, self.max_code).to(torch.uint8)

    def encode_centred(self, values: Tensor, scale: Tensor) -> Tensor:
        """Nearest codes of `values` in a symmetric format, minus its zero point, as int8."""
        return (values / scale).round_().clamp_(-self.mid_code, self.mid_code - 1).to(torch.int8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        zero_point = self.mid_code if params.zero_point is None else params.zero_point
        return codes.to(params.scale.dtype).sub_(zero_point).mul_(params.scale)

    def snap(self, values: Tensor, params: Params, out: Tensor | None = None) -> Tensor:
        steps = torch.div(values, params.scale, out=out)
        if params.zero_point is None:
            return steps.round_().clamp_(-self.mid_code, self.mid_code - 1).mul_(params.scale)
        zero_point = params.zero_point
        return steps.add_(zero_point).round_().clamp_(0, self.max_code).sub_(zero_point).mul_(params.scale)

    def exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale that covers the ranges; 0 for a group of zeros, and of equal values if 0.0 has no code."""
        if self.symmetric:
            return torch.maximum(high, -low) / self.steps
        if self.zero_point == "integer":
            low, high = low.clamp(max=0), high.clamp(min=0)
        return (high - low) / self.max_code

    def _zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """The zero point that maps `low` to code 0; rounded and clipped unless the format's zero point is float."""
        if self.zero_point == "float":
            return -low / scale
        return torch.round(-low.clamp(max=0) / scale).clamp(0, self.max_code)


@dataclass(frozen=True, kw_only=True)
class StoredInt(IntFormat):
    """Integer codes with scales that are stored as `scale_dtype`."""

    scale_dtype: ScaleDtype = "float16"

    def cover(self, low: Tensor, high: Tensor, whole: Tensor | None = None) -> Params:
        """Scale and zero point rounded to the dtypes in which they are stored.

        Raises: ValueError if a scale or zero point is too large for its dtype.
        """
        scale = scales.store(_positive(self.exact_scale(low, high)), self.scale_dtype, self.where)
        if self.symmetric:
            return Params(scale)
        zero_point = self._zero_point(low, scale)
        if self.zero_point == "float":
            zero_point = zero_point.to(getattr(torch, self.scale_dtype)).to(scale.dtype)
            if not torch.isfinite(zero_point).all():
                raise ValueError(
                    f"{self.where}.scale_dtype={self.scale_dtype} cannot hold the zero point of a group far from 0; "
                    f"use {self.where}.scale_dtype=float32, or {self.where}.zero_point=integer"
                )
        return Params(scale, zero_point)


def _positive(scale: Tensor) -> Tensor:
    return scale.masked_fill_(scale <= 0, 1)
