"""Integer codes of a linear's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.core.formats.format import ActivationFormat
from harness.core.formats.integer import IntFormat


@dataclass(frozen=True, kw_only=True)
class IntActivation(ActivationFormat, IntFormat):
    """Format of a linear's input in integer codes, see `ActivationFormat`; scales are not rounded."""

    def dynamic_scale(self, values: Tensor) -> Tensor:
        """The scale of `values` in a symmetric dynamic format; it broadcasts against them."""
        absmax = values.abs().amax(self.axes(values), keepdim=True)
        return self.symmetric_scale(absmax if self.clip == 1 else absmax * self.clip)
