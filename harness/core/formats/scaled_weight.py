"""Weights in formats whose scales follow from ranges and are stored in a float dtype: is it wide enough for them?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor

from harness.core.formats import scales
from harness.core.formats.format import WeightFormat, compute_dtype
from harness.core.formats.params import Params
from harness.core.formats.scales import ScaleDtype


class ScaledWeight(WeightFormat):
    """A weight format with `scale_dtype`, and the scale of a range before it is stored, `exact_scale`."""

    if TYPE_CHECKING:  # of the format of values, which a subclass also has as a base
        scale_dtype: ScaleDtype

        def exact_scale(self, low: Tensor, high: Tensor) -> Tensor: ...

    def check_scales(self, weight: Tensor, params: Params) -> None:
        """Check that the dtype of the stored scales is wide enough for the small weights of a weight (N, K).

        The check costs time only if a scale, any clipping included, is below the normal numbers of its dtype. Groups
        that lose more than one bit are a warning.
        Raises: ValueError if the rounding of the scales raises the error of the whole weight by more than 1 %.
        """
        if not scales.below_range(params.scale, self.scale_dtype):
            return
        groups = self.to_groups(weight.to(compute_dtype(weight)))
        exact = self.exact_scale(groups.amin(-1), groups.amax(-1))
        lost, count = scales.check(exact, self.scale_dtype, self.where, scales.MOST_GROWTH)
        if lost:
            warnings.warn(
                f"{lost} of {count} groups have scales below the range of {self.where}.scale_dtype={self.scale_dtype}; "
                "their weights, tiny relative to the others, are lost",
                stacklevel=3,
            )
