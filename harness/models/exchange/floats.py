"""Small floats of a checkpoint as a QTensor: FP8, MXFP4 and NVFP4."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from harness.core import FloatQTensor, FloatWeight
from harness.core.formats import Params
from harness.core.formats.packing import unpack
from harness.models.exchange.reader import damaged, expect, group_size

ELEMENTS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
_SCALES: dict[torch.dtype, Literal["float32", "bfloat16", "e8m0"]] = {  # how the scales of a file are stored here
    torch.float32: "float32",
    torch.float16: "float32",
    torch.bfloat16: "bfloat16",
    torch.float8_e8m0fnu: "e8m0",
}
_MX_GROUP, _NV_GROUP = 32, 16


def fp8(linear: str, weight: Tensor, scale: Tensor, block: int | None = None) -> FloatQTensor:
    """The weight (N, K) in an 8-bit float dtype of torch, times its scale.

    `scale` is (), (1,), (N,), (N, 1), (N, G), or one for each square of `block` outputs and inputs; powers of two, of
    MXFP8, are for groups.
    Raises: CheckpointError if shapes or dtypes do not fit.
    """
    expect(linear, "weight", weight, tuple(ELEMENTS), -1, -1)
    rows, columns = weight.shape
    size = -1 if block is None else block
    granularity: Literal["tensor", "channel", "group", "block"]
    if block is not None:
        granularity = "block"
        expect(linear, "scale", scale, _WIDE, -(-rows // block), -(-columns // block))
    elif scale.numel() == 1:
        granularity, scale = "tensor", scale.reshape(1, 1)
    elif scale.dim() == 2 and (scale.shape[1] > 1 or scale.dtype == torch.float8_e8m0fnu):
        granularity, size = "group", group_size(linear, columns, scale.shape[1])
        expect(linear, "scale", scale, tuple(_SCALES), rows, -1)
    else:
        granularity = "channel"
        scale = expect(linear, "scale", scale.reshape(-1, 1), _WIDE, rows, 1)
    fmt = FloatWeight(
        element=ELEMENTS[weight.dtype],
        granularity=granularity,
        group_size=size,
        scale_dtype=_SCALES[scale.dtype],
    )
    return FloatQTensor(weight.contiguous().view(torch.uint8), Params(_finite(linear, scale)), fmt)


def fp4(linear: str, packed: Tensor, scale: Tensor, whole: Tensor | None) -> FloatQTensor:
    """E2M1 weights from `packed` (N, K / 2) uint8, the first input in the low half of a byte.

    scale  (N, K / 16) float8_e4m3fn with a factor `whole` () of the tensor, or (N, K / 32) uint8, exponents plus 127

    Raises: CheckpointError if shapes or dtypes do not fit.
    """
    expect(linear, "weight_packed", packed, torch.uint8, -1, -1)
    size = _MX_GROUP if whole is None else _NV_GROUP
    rows, columns = len(packed), 2 * packed.shape[1]
    if columns % size:
        raise damaged(f"{linear} has {columns} inputs, which are no groups of {size}")
    codes = unpack(packed.flatten(), 4, (rows, columns))
    if whole is None:
        expect(linear, "weight_scale", scale, (torch.uint8, torch.float8_e8m0fnu), rows, columns // size)
        scale = scale.view(torch.float8_e8m0fnu)
    else:
        expect(linear, "weight_scale", scale, torch.float8_e4m3fn, rows, columns // size)
    fmt = FloatWeight(
        element="e2m1",
        granularity="group",
        group_size=size,
        scale_dtype="e8m0" if whole is None else "e4m3",
        tensor_scale=whole is not None,
    )
    factor = None if whole is None else _finite(linear, whole).reshape(())
    return FloatQTensor(codes, Params(_finite(linear, scale), whole=factor), fmt)


def _finite(linear: str, scale: Tensor) -> Tensor:
    """The scales in float32.

    Raises: CheckpointError if one is NaN or infinite.
    """
    values = scale.float()
    if not bool(values.isfinite().all()):
        raise damaged(f"{linear} has scales that are NaN or infinite")
    return values
