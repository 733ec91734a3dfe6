"""Integer codes of a checkpoint as a QTensor: symmetric if its zero points say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from harness.core import IntQTensor, IntWeight
from harness.core.formats import OffsetQTensor, OffsetWeight, Params, PermutedQTensor
from harness.core.formats.scales import ScaleDtype
from harness.models.exchange.reader import FileQTensor, Tensors, damaged, group_size

SCALES = (torch.float16, torch.bfloat16, torch.float32)


def integers(linear: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> IntQTensor:
    """The weight (code - zero_point) * scale, with `codes` (N, K) uint8.

    scale       (N, G), (N, 1) or (1, 1) in a dtype of `SCALES`; groups are consecutive inputs
    zero_point  integers of the same shape; None: 2^(bits - 1)

    Raises: CheckpointError if the groups are not equal, or a code or zero point needs more than `bits` bits.
    """
    _check_finite(linear, scale)
    if zero_point is not None and bool((zero_point == 1 << bits - 1).all()):
        zero_point = None
    if zero_point is not None and not 0 <= int(zero_point.min()) <= int(zero_point.max()) < 1 << bits:
        raise damaged(f"{linear} has a zero point beyond {bits} bits")
    fmt = _format(linear, codes, scale, bits, zero_point is None)
    stored = None if zero_point is None else zero_point.float()
    return IntQTensor(codes.contiguous(), Params(scale.float(), stored), fmt)


def float_zeros(linear: str, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> IntQTensor:
    """Likewise with zero points that are any floats, in the dtype of the scales.

    Raises: CheckpointError if the groups are not equal, a code needs more than `bits` bits, or a number is not finite.
    """
    for numbers in (scale, zero_point):
        _check_finite(linear, numbers)
    if int(codes.max()) >> bits:
        raise damaged(f"{linear} has a code beyond {bits} bits")
    fmt = _format(linear, codes, scale, bits, False)
    params = Params(scale.float(), zero_point.float())
    return IntQTensor(codes.contiguous(), params, replace(fmt, zero_point="float"))


def offsets(linear: str, codes: Tensor, scale: Tensor, offset: Tensor, bits: int) -> OffsetQTensor:
    """The weight code * scale + offset, with `codes` (N, K) uint8, `scale` and `offset` (N, G) of consecutive inputs.

    Raises: CheckpointError if the groups are not equal.
    """
    size = group_size(linear, codes.shape[1], scale.shape[1])
    fmt = OffsetWeight(bits=bits, granularity="group", group_size=size, scale_dtype="float32")
    return OffsetQTensor(codes, scale, offset, fmt)


def unsigned(linear: str, codes: Tensor, bits: int) -> Tensor:
    """Codes with a sign as codes from 0.

    Raises: CheckpointError if one needs more bits.
    """
    middle = 1 << bits - 1
    if not -middle <= int(codes.min()) <= int(codes.max()) < middle:
        raise damaged(f"{linear}.weight has a code beyond {bits} bits")
    return (codes.to(torch.int16) + middle).to(torch.uint8)


def _check_finite(linear: str, scale: Tensor) -> None:
    if not bool(scale.isfinite().all()):
        raise damaged(f"{linear} has scales that are NaN or infinite")


def _format(linear: str, codes: Tensor, scale: Tensor, bits: int, symmetric: bool) -> IntWeight:
    (rows, columns), shape = codes.shape, tuple(scale.shape)
    granularity: Literal["tensor", "channel", "group"] = "group"
    size = -1
    if shape == (1, 1) and rows != 1:
        granularity = "tensor"
    elif shape == (rows, 1):
        granularity = "channel"
    elif shape[0] == rows:
        size = group_size(linear, columns, shape[1])
    else:
        raise damaged(f"{linear} has scales {'x'.join(map(str, shape))} for a weight {rows}x{columns}")
    scale_dtype: ScaleDtype = str(scale.dtype).removeprefix("torch.")  # type: ignore[assignment]  # `SCALES` are its values
    return IntWeight(bits=bits, granularity=granularity, group_size=size, symmetric=symmetric, scale_dtype=scale_dtype)


def regrouped(
    name: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, g_idx: Tensor, bits: int
) -> IntQTensor | PermutedQTensor | FileQTensor:
    """Likewise with the group of each input, `g_idx` (K,) int64: in any order, and of any sizes.

    Raises: CheckpointError if a group has no scale.
    """
    groups = scale.shape[1]
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise damaged(f"{name} has an input in a group beyond the {groups} of its scales")
    if _consecutive(g_idx, groups):
        return integers(name, codes, scale, zero_point, bits)
    order = g_idx.argsort(stable=True)
    if _consecutive(g_idx[order], groups):
        return PermutedQTensor(integers(name, codes[:, order], scale, zero_point, bits), order)
    middle = torch.full_like(scale, 1 << bits - 1, dtype=torch.int32)
    parts: Tensors = {"codes": codes, "scale": scale, "g_idx": g_idx}
    parts["zero_point"] = middle if zero_point is None else zero_point
    return FileQTensor((codes.shape[0], codes.shape[1]), f"int{bits} groups of any size", parts, _decode)


def _consecutive(g_idx: Tensor, groups: int) -> bool:
    """Whether groups are consecutive inputs of equal number."""
    size, left = divmod(len(g_idx), groups)
    return left == 0 and torch.equal(g_idx, torch.arange(len(g_idx)) // size)


def _decode(parts: Tensors) -> Tensor:
    groups = parts["g_idx"]
    return (parts["codes"] - parts["zero_point"][:, groups]).float() * parts["scale"].float()[:, groups]
