"""Round to nearest: round each weight to the nearest point of its group's minimum-maximum grid.

Paper: the baseline of every paper in this field; as in Frantar et al. 2022, arXiv 2210.17323, section 4.
Differs: the scale is rounded to its stored dtype (float16 by default) before codes are chosen; the authors keep
    float32, which `scheme.weight.scale_dtype=float32` gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.core import Method, QTensor, Scheme, Stats, round_to_nearest


@dataclass(frozen=True, kw_only=True)
class RTN(Method):
    """Needs no calibration data; all options are the scheme's."""

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        return round_to_nearest(weight, scheme.format)
