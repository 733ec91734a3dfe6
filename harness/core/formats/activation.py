"""Quantization of a linear's input by an activation format: to codes with a scale, or to decoded values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.core.formats.floating_activation import FloatActivation
from harness.core.formats.format import ActivationFormat, compute_dtype
from harness.core.formats.integer_activation import IntActivation
from harness.core.formats.params import Params


class InputQuantizer(nn.Module):
    """Quantizes a linear's input by an activation format, with dynamic (run-time) or calibrated ranges.

    A static format takes `bounds`: the smallest and the largest input in the calibration data.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, fmt: ActivationFormat, bounds: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.fmt = fmt
        if bounds is not None:
            params = fmt.cover(*fmt.clipped(*bounds))
            self.register_buffer("scale", params.scale)
            self.register_buffer("zero_point", params.zero_point)

    @property
    def integers(self) -> IntActivation | None:
        """The format, if codes are integers with a scale per token or sequence."""
        return self.fmt if isinstance(self.fmt, IntActivation) and self.fmt.granularity != "group" else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Round `inputs` (..., K) to the format, in their dtype; outlier channels stay unchanged."""
        values = inputs.to(compute_dtype(inputs))
        outliers = self.outliers(values)
        regular = values if outliers is None else values.masked_fill(outliers, 0)
        groups = self.fmt.to_groups(regular)
        snapped = self.fmt.from_groups(self.fmt.snap(groups, self._params(groups)), values.shape[-1])
        return (snapped if outliers is None else torch.where(outliers, values, snapped)).to(inputs.dtype)

    def encode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Encode `inputs` (..., K) in a symmetric integer format, or in 8-bit floats with a scale per token or tensor.

        The caller must have removed the outliers.
        Returns: int8 codes (..., K) minus the zero point, or floats in torch's dtype of 8 bits, and a scale whose shape
        broadcasts against the codes.
        """
        fmt, values = self.fmt, inputs.to(compute_dtype(inputs))
        if isinstance(fmt, FloatActivation):
            params = self._params(values)
            return fmt.cast(values, params), params.scale
        assert isinstance(fmt, IntActivation)
        scale = fmt.dynamic_scale(values) if fmt.dynamic else self.scale.to(values.dtype)
        return fmt.encode_centred(values, scale), scale

    def outliers(self, inputs: Tensor) -> Tensor | None:
        """Mask of channels of `inputs` (..., T, K) where any token of the sequence reaches the threshold: (..., 1, K).

        Returns: None if the format has no threshold.
        """
        if self.fmt.threshold is None:
            return None
        return (inputs.abs() >= self.fmt.threshold).any(-2 if inputs.dim() > 1 else 0, keepdim=True)

    def _params(self, groups: Tensor) -> Params:
        if not self.fmt.dynamic:
            return Params(self.scale, self.zero_point).map(lambda values: values.to(groups.dtype))
        axes, whole = self.fmt.axes(groups), self.fmt.whole(groups)
        if axes == (-1,) and self.fmt.clip == 1:
            return self.fmt.params(groups, whole).spread()
        low, high = (bound(axes, keepdim=True).squeeze(-1) for bound in (groups.amin, groups.amax))
        return self.fmt.cover(*self.fmt.clipped(low, high), whole).spread()
