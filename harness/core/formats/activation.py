"""Quantization of a linear's input by an activation format: to codes with a scale, or to decoded values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.core.formats import grid
from harness.core.scheme import ActivationFormat


class InputQuantizer(nn.Module):
    """Quantizes a linear's input by an activation format, with dynamic (run-time) or calibrated ranges.

    A static format takes `bounds`: the smallest and the largest input in the calibration data.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, fmt: ActivationFormat, bounds: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.fmt = fmt
        if bounds is not None:
            scale, zero_point = grid.range_params(*self._clipped(*bounds), fmt)
            self.register_buffer("scale", scale)
            self.register_buffer("zero_point", zero_point)

    def forward(self, inputs: Tensor) -> Tensor:
        """Round `inputs` (..., K) to the grid, in their dtype; outlier channels stay unchanged."""
        values = inputs.to(grid.compute_dtype(inputs))
        outliers = self.outliers(values)
        if outliers is None:
            return grid.snap(values, *self._params(values), self.fmt).to(inputs.dtype)
        regular = values.masked_fill(outliers, 0)
        snapped = grid.snap(regular, *self._params(regular), self.fmt)
        return torch.where(outliers, values, snapped).to(inputs.dtype)

    def encode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Encode `inputs` (..., K) in a symmetric format; the caller must have removed the outliers.

        Returns: int8 codes (..., K) minus the zero point, and a scale whose shape broadcasts against the codes.
        """
        values = inputs.to(grid.compute_dtype(inputs))
        if self.fmt.dynamic:
            absmax = values.abs().amax(self._axes(values), keepdim=True)
            scale = grid.symmetric_scale(absmax if self.fmt.clip == 1 else absmax * self.fmt.clip, self.fmt)
        else:
            scale = self.scale.to(values.dtype)
        return grid.encode_centred(values, scale, self.fmt), scale

    def outliers(self, inputs: Tensor) -> Tensor | None:
        """Mask of channels of `inputs` (..., T, K) where any token of the sequence reaches the threshold: (..., 1, K).

        Returns: None if the format has no threshold.
        """
        if self.fmt.threshold is None:
            return None
        return (inputs.abs() >= self.fmt.threshold).any(-2 if inputs.dim() > 1 else 0, keepdim=True)

    def _params(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.fmt.dynamic:
            return grid.range_params(*self._bounds(values), self.fmt)
        return self.scale.to(values.dtype), self.zero_point.to(values.dtype)

    def _bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each set of values that shares a scale."""
        axes = self._axes(values)
        return self._clipped(values.amin(axes, keepdim=True), values.amax(axes, keepdim=True))

    def _clipped(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range that the grid covers: the observed range [low, high] times `clip`."""
        return (low, high) if self.fmt.clip == 1 else (low * self.fmt.clip, high * self.fmt.clip)

    def _axes(self, values: Tensor) -> tuple[int, ...]:
        """Axes that share a scale: the channels of a token, or every axis of a sequence (all except the batch axis)."""
        if self.fmt.granularity == "token":
            return (-1,)
        return tuple(range(1 if values.dim() > 2 else 0, values.dim()))
