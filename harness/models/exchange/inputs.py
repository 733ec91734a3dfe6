"""What quantizes the inputs of a checkpoint's linears, with the scales that the checkpoint has."""

from __future__ import annotations

from torch import Tensor

from harness.core.formats import InputQuantizer, Params
from harness.core.formats.format import ActivationFormat


def calibrated(fmt: ActivationFormat, scale: Tensor, zero_point: Tensor | None = None) -> InputQuantizer:
    """A quantizer of inputs with one calibrated `scale` (), and a zero point (), a code, if the format has one."""
    quantizer = InputQuantizer(fmt)
    quantizer.register_buffer("scale", scale.float().reshape(()))
    quantizer.register_buffer("zero_point", None if zero_point is None else zero_point.float().reshape(()))
    return quantizer


class FixedTensorScale(InputQuantizer):
    """Inputs in groups whose scales are found at run time, below one calibrated scale of the tensor (NVFP4)."""

    whole: Tensor

    def __init__(self, fmt: ActivationFormat, whole: Tensor) -> None:
        """`whole` () is what a group's stored scale is multiplied by."""
        super().__init__(fmt)
        self.register_buffer("whole", whole.float().reshape(()))

    def _params(self, groups: Tensor) -> Params:
        return self.fmt.params(groups, self.whole.to(groups.dtype)).spread()
