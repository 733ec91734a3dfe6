"""Small floats of a linear's input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from harness.core.formats.floating import FloatFormat
from harness.core.formats.format import ActivationFormat, sequence_axes


@dataclass(frozen=True, kw_only=True)
class FloatActivation(ActivationFormat, FloatFormat):
    """Format of a linear's input in small floats, see `ActivationFormat`; a tensor scale belongs to a sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tensor_scale and not self.dynamic:
            raise ValueError(
                "tensor_scale=true with dynamic=false: a calibrated scale belongs to the whole tensor already; "
                "expected dynamic=true, or tensor_scale=false"
            )
        if self.scale_search != "none" and (self.granularity == "tensor" or self.clip != 1):
            raise ValueError(
                f"scale_search={self.scale_search} with granularity={self.granularity} and clip={self.clip:g}; "
                "expected granularity=token or group and clip=1, or scale_search=none"
            )

    def whole(self, values: Tensor) -> Tensor | None:
        if not self.tensor_scale:
            return None
        axes = sequence_axes(values, 3 if self.granularity == "group" else 2)
        return self.tensor_factor(values.abs().amax(axes, keepdim=True).squeeze(-1))
