"""What quantizes the inputs of a checkpoint's linears, with the scales that the checkpoint has."""

from __future__ import annotations

from torch import Tensor

from harness.core import FloatActivation
from harness.core.formats import InputQuantizer, Params
from harness.core.formats.format import ActivationFormat


def calibrated(fmt: ActivationFormat, scale: Tensor, zero_point: Tensor | None = None) -> InputQuantizer:
    """A quantizer of inputs with one calibrated `scale` (), and a zero point (), a code, if the format has one."""
    quantizer = InputQuantizer(fmt)
    quantizer.register_buffer("scale", scale.float().reshape(()))
    quantizer.register_buffer("zero_point", None if zero_point is None else zero_point.float().reshape(()))
    return quantizer


def static_fp8(scale: Tensor) -> InputQuantizer:
    """FP8 inputs with one calibrated scale."""
    return calibrated(FloatActivation(element="e4m3", granularity="tensor", dynamic=False), scale)


def dynamic_fp8(group_size: int | None) -> InputQuantizer:
    """FP8 inputs that are scaled at run time: each token, or so many channels of it."""
    if group_size is None:
        return InputQuantizer(FloatActivation(element="e4m3"))
    return InputQuantizer(FloatActivation(element="e4m3", granularity="group", group_size=group_size))


def nvfp4(whole: Tensor | None) -> InputQuantizer:
    """NVFP4 inputs; `whole` is the calibrated scale of the tensor, None: it is found at run time."""
    fmt = FloatActivation(element="e2m1", granularity="group", group_size=16, scale_dtype="e4m3", tensor_scale=True)
    return InputQuantizer(fmt) if whole is None else FixedTensorScale(fmt, whole)


class FixedTensorScale(InputQuantizer):
    """Inputs in groups whose scales are found at run time, below one calibrated scale of the tensor (NVFP4)."""

    whole: Tensor

    def __init__(self, fmt: ActivationFormat, whole: Tensor) -> None:
        """`whole` () is what a group's stored scale is multiplied by."""
        super().__init__(fmt)
        self.register_buffer("whole", whole.float().reshape(()))

    def _params(self, groups: Tensor) -> Params:
        return self.fmt.params(groups, self.whole.to(groups.dtype)).spread()
