"""Scales in the float dtype in which they are stored.

Both ends of the range of a dtype are checked. A scale above the range is refused. One below it is rounded up, to s'. A
value that is rounded on a grid of step s has a mean squared error of s^2 / 12, so the error of a weight grows by the
factor sum s'^2 / sum s^2 over its groups. A growth above 1.02, 1 % in the norm, is refused. Groups that are tiny
relative to the others (dead channels) hardly count in these sums; a warning says how many of them are lost.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScaleDtype = Literal["float16", "bfloat16", "float32"]
BITS: dict[ScaleDtype, int] = {"float16": 16, "bfloat16": 16, "float32": 32}
SHRUNK = tuple(1 - i / 20 for i in range(1, 11))  # shares of a range that a search for a clipped one tries
MOST_GROWTH = 1.02  # of the squared rounding error, by scales below the range of their dtype

# A float16 below the smallest normal number has few digits; rounding such a scale up keeps the range covered.
_TINY_FLOAT16 = torch.finfo(torch.float16).tiny
_STEP_FLOAT16 = 2.0**-24
_LOST = 2.0  # a scale rounded up by more than this factor costs more than one bit


def store(scale: Tensor, dtype: ScaleDtype, where: str) -> Tensor:
    """Round `scale` to a value that is exact in `dtype`; the dtype of the tensor does not change.

    `where` is the configuration key of the format in the message.
    Raises: ValueError if a scale overflows `dtype`; a wider one is the remedy.
    """
    exact = getattr(torch, dtype)
    stored = scale.to(exact).to(scale.dtype)
    if dtype == "bfloat16":  # a scale of 0 would turn the group into NaN
        stored = stored.clamp(min=torch.finfo(exact).smallest_normal * torch.finfo(exact).eps)
    if dtype == "float16":
        subnormal = torch.ceil(scale / _STEP_FLOAT16) * _STEP_FLOAT16
        stored = torch.where(scale < _TINY_FLOAT16, subnormal, stored)
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"{where}.scale_dtype={dtype} cannot hold the scale {float(scale.max()):.3g}; "
            f"use {where}.scale_dtype=float32"
        )
    return stored


def below_range(scale: Tensor, dtype: ScaleDtype) -> bool:
    """Whether a stored scale is below the normal numbers of its dtype."""
    return bool(scale.min() < torch.finfo(getattr(torch, dtype)).tiny)


def check(exact: Tensor, dtype: ScaleDtype, where: str, most: float) -> tuple[int, int]:
    """Check the `exact` scales of a tensor's groups, 0 for a group of zeros, against the lower end of `dtype`.

    Returns: the number of groups that lose more than one bit, and the number of groups that are not constant.
    Raises: ValueError if the squared rounding error of all groups grows by more than the factor `most`.
    """
    exact = exact[exact > 0]
    if not len(exact):
        return 0, 0
    ratio = store(exact, dtype, where) / exact
    share = exact / exact.max()  # squares of the scales themselves could be below float32's range
    growth = float((share * ratio).square().sum() / share.square().sum())
    if growth > most:
        largest = float(exact.max())
        remedy = "skip this linear" if dtype == "float32" else f"use {where}.scale_dtype=float32"
        raise ValueError(f"{where}.scale_dtype={dtype} cannot hold the scales, {largest:.3g} and smaller; {remedy}")
    return int((ratio > _LOST).sum()), len(exact)
