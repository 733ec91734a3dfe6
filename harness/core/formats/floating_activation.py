"""Small floats of a linear's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from harness.core.formats.floating import FloatFormat
from harness.core.formats.format import ActivationFormat, padded, sequence_axes


@dataclass(frozen=True, kw_only=True)
class FloatActivation(ActivationFormat, FloatFormat):
    """Format of a linear's input in small floats, see `ActivationFormat`.

    granularity  also group: `group_size` consecutive channels of a token share a scale, the last of them may be fewer;
                 a tensor scale then belongs to a sequence
    """

    granularity: Literal["token", "tensor", "group"] = "token"
    group_size: int = -1

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
        if (self.granularity == "group") != (self.group_size > 0):
            raise ValueError(
                f"group_size={self.group_size} does not fit granularity={self.granularity}; expected a positive number "
                "with granularity=group, otherwise -1"
            )

    def to_groups(self, values: Tensor) -> Tensor:
        if self.granularity != "group":
            return values
        return padded(values, self.group_size).view(*values.shape[:-1], -1, self.group_size)

    def from_groups(self, groups: Tensor, channels: int) -> Tensor:
        return groups.flatten(-2)[..., :channels] if self.granularity == "group" else groups

    def axes(self, groups: Tensor) -> tuple[int, ...]:
        return (-1,) if self.granularity == "group" else super().axes(groups)

    def whole(self, values: Tensor) -> Tensor | None:
        if not self.tensor_scale:
            return None
        axes = sequence_axes(values, 3 if self.granularity == "group" else 2)
        return self.tensor_factor(values.abs().amax(axes, keepdim=True).squeeze(-1))
