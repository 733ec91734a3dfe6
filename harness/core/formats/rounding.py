"""Rounding to nearest in any format of weights."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from harness.core.formats.floating_weight import FloatQTensor, FloatWeight
from harness.core.formats.format import WeightFormat
from harness.core.formats.integer_weight import IntQTensor, IntWeight
from harness.core.formats.qtensor import QTensor


@overload
def round_to_nearest(weight: Tensor, fmt: IntWeight) -> IntQTensor: ...
@overload
def round_to_nearest(weight: Tensor, fmt: FloatWeight) -> FloatQTensor: ...
@overload
def round_to_nearest(weight: Tensor, fmt: WeightFormat) -> QTensor: ...


def round_to_nearest(weight: Tensor, fmt: WeightFormat) -> QTensor:
    """Quantize a weight (N, K) in the ranges of its groups, each value to the nearest code.

    Raises: ValueError if the weight is not finite, or the dtype of the scales cannot hold them.
    """
    params = fmt.weight_params(weight)
    fmt.check_scales(weight, params)
    return fmt.quantized(weight, params)
