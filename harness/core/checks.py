"""Range checks of options, shared by configuration classes and methods, with one-line errors; a check of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def at_least(owner: object, low: int, *keys: str) -> None:
    """Raises: ValueError if an attribute of `owner` is less than `low`, or NaN."""
    for key in keys:
        if not getattr(owner, key) >= low:
            raise ValueError(f"{key}={getattr(owner, key)} is out of range; expected {low} or more")


def above_zero(owner: object, *keys: str) -> None:
    """Raises: ValueError if an attribute of `owner` is 0, negative or NaN."""
    for key in keys:
        if not getattr(owner, key) > 0:
            raise ValueError(f"{key}={getattr(owner, key)} is out of range; expected more than 0")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The smallest and the largest tell, five times as fast as a test of each."""
    return all(map(math.isfinite, map(float, torch.aminmax(values.detach())))) if values.numel() else True
