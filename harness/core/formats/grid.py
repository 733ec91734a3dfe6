"""The uniform integer grid: the only module of this project that rounds a value to a code.

For codes 0 .. Q with Q = 2^bits - 1 (so Qmin = 0, Qmax = Q), and a group of values with range [min, max],
which is widened to include 0.0 if the zero point is an integer:

    asymmetric        scale = (max - min) / Q                zero_point = clip(round(-min / scale), 0, Q)
      float zero      scale = (max - min) / Q                zero_point = -min / scale
    symmetric full    scale = 2 absmax / Q                   zero_point = 2^(bits - 1)
    symmetric narrow  scale = absmax / (2^(bits - 1) - 1)    zero_point = 2^(bits - 1)

    code = clip(round(value / scale + zero_point), 0, Q)     value' = (code - zero_point) * scale

Symmetric formats add the zero point after rounding, which gives the same code unless the sum is inexact in float32.
`full` is GPTQ's symmetric grid (IST-DASLab/gptq quant.py), `narrow` that of AWQ and SmoothQuant. Rounding is
to nearest, ties to even. Scales are rounded to their stored dtype before any code is chosen, so that codes are
optimised for the stored scales.

Both ends of the range of a scale dtype are checked. A scale above the range is refused. One below it is rounded up, to
s'. A value that is rounded on a grid of step s has a mean squared error of s^2 / 12, so the error of a weight grows by
the factor sum s'^2 / sum s^2 over its groups. A growth above 1.02, 1 % in the norm, is refused. Groups that are tiny
relative to the others (dead channels) hardly count in these sums; a warning says how many of them are lost.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from harness.core.finite import all_finite
from harness.core.scheme import IntFormat, StoredFormat, WeightFormat

# A float16 below the smallest normal number has few digits; rounding such a scale up keeps the range covered.
_TINY_FLOAT16 = torch.finfo(torch.float16).tiny
_STEP_FLOAT16 = 2.0**-24
_MOST_GROWTH = 1.02  # of the squared rounding error, by scales below the range of their dtype
_LOST = 2.0  # a scale rounded up by more than this factor costs more than one bit


def compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype of grid arithmetic on `value`: float64 for float64, otherwise float32."""
    return torch.promote_types(value.dtype, torch.float32)


def range_params(low: Tensor, high: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups with the ranges [low, high].

    Returns: scale > 0 and zero_point, both with the shape and float dtype of the ranges. A group of zeros
    gets scale 1, so that it decodes to zeros.
    """
    scale = _positive(_step(low, high, fmt))
    if fmt.symmetric:
        return scale, torch.full_like(scale, fmt.mid_code)
    return scale, zero_point_of(low.clamp(max=0) if fmt.zero_point == "integer" else low, scale, fmt)


def _step(low: Tensor, high: Tensor, fmt: IntFormat) -> Tensor:
    """The scale that covers the ranges [low, high]; 0 for a group of zeros, and of equal values if 0.0 has no code."""
    if fmt.symmetric:
        return torch.maximum(high, -low) / symmetric_steps(fmt)
    if fmt.zero_point == "integer":
        low, high = low.clamp(max=0), high.clamp(min=0)
    return (high - low) / fmt.max_code


def symmetric_scale(absmax: Tensor, fmt: IntFormat) -> Tensor:
    """Scale of groups whose largest magnitude is `absmax`, in the same shape and dtype; 1 for a group of zeros."""
    return _positive(absmax / symmetric_steps(fmt))


def symmetric_steps(fmt: IntFormat) -> float:
    """Code steps from 0.0 to the largest magnitude that a symmetric format covers."""
    return fmt.max_code / 2 if fmt.grid == "full" else fmt.mid_code - 1


def zero_point_of(low: Tensor, scale: Tensor, fmt: IntFormat) -> Tensor:
    """The zero point that maps `low` to code 0; rounded and clipped unless the format's zero point is float."""
    if fmt.zero_point == "float":
        return -low / scale
    return torch.round(-low / scale).clamp(0, fmt.max_code)


def encode(value: Tensor, scale: Tensor, zero_point: Tensor, fmt: IntFormat) -> Tensor:
    """Nearest codes of `value`, as uint8; scale and zero_point broadcast against `value`."""
    if fmt.symmetric:
        return encode_centred(value, scale, fmt).add_(fmt.mid_code).view(torch.uint8)  # int8 must wrap around here
    return (value / scale).add_(zero_point).round_().clamp_(0, fmt.max_code).to(torch.uint8)


def encode_centred(value: Tensor, scale: Tensor, fmt: IntFormat) -> Tensor:
    """Nearest codes of `value` in a symmetric format, minus its zero point, as int8."""
    return (value / scale).round_().clamp_(-fmt.mid_code, fmt.mid_code - 1).to(torch.int8)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of the integer tensor `codes`, in the dtype of `scale`."""
    return codes.to(scale.dtype).sub_(zero_point).mul_(scale)


def snap(value: Tensor, scale: Tensor, zero_point: Tensor, fmt: IntFormat, out: Tensor | None = None) -> Tensor:
    """Round `value` to the nearest point of the grid: `decode(encode(value))` without the integer tensor.

    Returns: `out`, if given, with the result.
    """
    steps = torch.div(value, scale, out=out)
    if fmt.symmetric:
        return steps.round_().clamp_(-fmt.mid_code, fmt.mid_code - 1).mul_(scale)
    return steps.add_(zero_point).round_().clamp_(0, fmt.max_code).sub_(zero_point).mul_(scale)


def snap_weight(weight: Tensor, fmt: WeightFormat) -> Tensor:
    """Round a weight (N, K) to nearest on its minimum-maximum grid, as floats; searches call this many times."""
    scale, zero_point = weight_params(weight, fmt)
    groups = to_groups(weight.to(scale.dtype), fmt)
    return snap(groups, scale[..., None], zero_point[..., None], fmt).view(weight.shape).to(weight.dtype)


def to_groups(weight: Tensor, fmt: WeightFormat) -> Tensor:
    """View of a weight (N, K) as (rows, G, group_size) of `fmt`; rows is 1 for granularity `tensor`, else N."""
    rows, columns = fmt.groups((weight.shape[0], weight.shape[1]))
    return weight.reshape(rows, columns, -1)


def weight_params(weight: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight (N, K) from its groups' minimum and maximum.

    Returns: scale and zero_point of shape (N, G), or (1, 1) per tensor, exactly representable in
    `fmt.scale_dtype` (zero_point only if it is a float).
    Raises: ValueError if the weight has a NaN or an infinity, or a scale is too large for its dtype.
    """
    check_finite(weight)
    groups = to_groups(weight.to(compute_dtype(weight)), fmt)
    return stored_params(groups.amin(-1), groups.amax(-1), fmt)


def check_finite(weight: Tensor) -> None:
    """Raises: ValueError if a weight has a NaN or an infinity."""
    if not all_finite(weight):
        raise ValueError(
            "the weight holds NaN or infinite values; expected finite ones, check the checkpoint and model.dtype"
        )


def stored_params(low: Tensor, high: Tensor, fmt: StoredFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups with the ranges [low, high], rounded to the dtypes in which `fmt` stores them.

    Raises: ValueError if a scale or zero point is too large for its dtype.
    """
    scale = store_scale(range_params(low, high, fmt)[0], fmt)
    if fmt.symmetric:
        return scale, torch.full_like(scale, fmt.mid_code)
    if fmt.zero_point == "integer":
        return scale, zero_point_of(low.clamp(max=0), scale, fmt)
    stored = zero_point_of(low, scale, fmt).to(getattr(torch, fmt.scale_dtype))
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"{fmt.where}.scale_dtype={fmt.scale_dtype} cannot hold the zero point of a group far from 0; "
            f"use {fmt.where}.scale_dtype=float32, or {fmt.where}.zero_point=integer"
        )
    return scale, stored.to(scale.dtype)


def store_scale(scale: Tensor, fmt: StoredFormat) -> Tensor:
    """Round `scale` to a value that is exact in `fmt.scale_dtype`; the dtype of the tensor does not change.

    Raises: ValueError if a scale overflows `fmt.scale_dtype`; a wider scale_dtype is the remedy.
    """
    dtype = getattr(torch, fmt.scale_dtype)
    stored = scale.to(dtype).to(scale.dtype)
    if fmt.scale_dtype == "bfloat16":  # a scale of 0 would turn the group into NaN
        stored = stored.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    if fmt.scale_dtype == "float16":
        subnormal = torch.ceil(scale / _STEP_FLOAT16) * _STEP_FLOAT16
        stored = torch.where(scale < _TINY_FLOAT16, subnormal, stored)
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"{fmt.where}.scale_dtype={fmt.scale_dtype} cannot hold the scale {float(scale.max()):.3g}; "
            f"use {fmt.where}.scale_dtype=float32"
        )
    return stored


def check_scales(weight: Tensor, scale: Tensor, fmt: WeightFormat) -> None:
    """Check that the dtype of the stored scales is wide enough for the small weights of a weight (N, K).

    `scale` are the weight's stored scales (any clipping included); the check costs time only if one is below the normal
    numbers of its dtype. Groups that lose more than one bit are a warning.
    Raises: ValueError if the rounding of the scales raises the error of the whole weight by more than 1 %.
    """
    if below_range(scale, fmt):
        groups = to_groups(weight.to(compute_dtype(weight)), fmt)
        lost, count = check_ranges(groups.amin(-1), groups.amax(-1), fmt)
        if lost:
            warnings.warn(
                f"{lost} of {count} groups have scales below the range of {fmt.where}.scale_dtype={fmt.scale_dtype}; "
                "their weights, tiny relative to the others, are lost",
                stacklevel=3,
            )


def below_range(scale: Tensor, fmt: StoredFormat) -> bool:
    """Whether a stored scale is below the normal numbers of its dtype."""
    return bool(scale.min() < torch.finfo(getattr(torch, fmt.scale_dtype)).tiny)


def check_ranges(low: Tensor, high: Tensor, fmt: StoredFormat, most: float = _MOST_GROWTH) -> tuple[int, int]:
    """Check the scales of groups with the ranges [low, high] against the lower end of their stored dtype.

    Returns: the number of groups that lose more than one bit, and the number of groups that are not constant.
    Raises: ValueError if the squared rounding error of all groups grows by more than the factor `most`.
    """
    exact = _step(low, high, fmt)
    exact = exact[exact > 0]
    if not len(exact):
        return 0, 0
    ratio = store_scale(exact, fmt) / exact
    share = exact / exact.max()  # squares of the scales themselves could be below float32's range
    growth = float((share * ratio).square().sum() / share.square().sum())
    if growth > most:
        largest = float(exact.max())
        remedy = "skip this linear" if fmt.scale_dtype == "float32" else f"use {fmt.where}.scale_dtype=float32"
        raise ValueError(
            f"{fmt.where}.scale_dtype={fmt.scale_dtype} cannot hold the scales, {largest:.3g} and smaller; {remedy}"
        )
    return int((ratio > _LOST).sum()), len(exact)


def _positive(scale: Tensor) -> Tensor:
    return scale.masked_fill_(scale <= 0, 1)
