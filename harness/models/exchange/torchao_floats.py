"""Small floats of torchao: a QTensor from the tensors of a weight and its attributes.

    Float8Tensor   qdata (N, K) 8-bit floats; a scale for each block of `block_size`
    MXTensor       qdata likewise, or (N, K / 2) uint8 E2M1; scale (N, K / block_size) float8_e8m0fnu
    NVFP4Tensor    qdata (N, K / 2) uint8, scale (N, K / 16) float8_e4m3fn, perhaps per_tensor_scale ()

With `is_swizzled_scales`, scales are in tiles of 128 rows and 4 columns, filled up with zeros: row r of a tile is at
4 * (r // 32) in line r % 32 of 16 values.

Source: torchao, quantization/quantize_/workflows/float8 and prototype/mx_formats, utils.py, to_blocked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.core import QTensor
from harness.models.exchange.floats import fp4, fp8
from harness.models.exchange.reader import Tensors, damaged, unsupported

_ROWS, _COLUMNS, _LINES = 128, 4, 32
Json = Mapping[str, Any]


def float8(name: str, tensors: Tensors, attributes: Json) -> QTensor:
    """Raises: CheckpointError if a block is no square, row or part of a row."""
    sides, scale = attributes.get("block_size"), tensors["scale"]
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise damaged(f"the header of its file has block_size={sides} for {name}.weight")
    squares = sides[0] > 1 and scale.numel() > 1
    if squares and sides[0] != sides[1]:
        raise unsupported("block_size", sides, "a square, or a part of a row")
    return fp8(name, tensors["qdata"], scale, sides[0] if squares else None)


def mx(name: str, tensors: Tensors, attributes: Json) -> QTensor:
    """Raises: CheckpointError for groups of E2M1 that are not of 32."""
    data = tensors["qdata"]
    columns = data.shape[-1] * (2 if data.dtype == torch.uint8 else 1)
    scale = _scales(name, (len(data), columns), tensors["scale"], attributes)
    if scale.dtype != torch.float8_e8m0fnu:
        raise damaged(f"{name}.weight.scale is {scale.dtype}, expected float8_e8m0fnu")
    return fp4(name, data, scale, None) if data.dtype == torch.uint8 else fp8(name, data, scale)


def nvfp4(name: str, tensors: Tensors, attributes: Json) -> QTensor:
    """Raises: CheckpointError if shapes or dtypes do not fit."""
    data = tensors["qdata"]
    scale = _scales(name, (len(data), 2 * data.shape[-1]), tensors["scale"], attributes)
    return fp4(name, data, scale, tensors.get("per_tensor_scale", torch.ones(())))


def _scales(name: str, shape: tuple[int, int], scale: Tensor, attributes: Json) -> Tensor:
    """The scales (N, G) of a weight (N, K)."""
    if not attributes.get("is_swizzled_scales"):
        return scale
    size = attributes.get("block_size")
    if not isinstance(size, int) or size < 1:
        raise damaged(f"the header of its file has block_size={size} for {name}.weight")
    rows, groups = shape[0], shape[1] // size
    tiles = -(-rows // _ROWS), -(-groups // _COLUMNS)
    if scale.itemsize != 1 or scale.numel() != tiles[0] * tiles[1] * _ROWS * _COLUMNS:
        raise damaged(f"{name}.weight.scale has {scale.numel()} values, which are no {tiles[0]}x{tiles[1]} tiles")
    lines = scale.view(torch.uint8).reshape(*tiles, _LINES, _ROWS // _LINES, _COLUMNS)
    matrix = lines.permute(0, 3, 2, 1, 4).reshape(tiles[0] * _ROWS, tiles[1] * _COLUMNS)
    return matrix[:rows, :groups].contiguous().view(scale.dtype)
