"""gemlite 0.6.0.post2: Triton kernels for GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.kernels.bench.peers.base import (
    HALVES,
    Built,
    check_device,
    check_dtype,
    check_group,
    check_multiple,
    require,
    rounded,
)

_COLUMNS = 32
_GROUP = 16


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """gemlite's layer for HQQ's format: asymmetric, with float zero points in the dtype of the inputs."""
    require("gemlite", "gemlite")
    check_device("gemlite", weight, ("cuda",))  # before the import, which reads the GPU's name
    check_dtype("gemlite", dtype, HALVES)
    check_group("gemlite", weight, group_size)
    check_multiple("gemlite", weight, 1, _COLUMNS)
    if group_size < _GROUP:
        raise ValueError(f"gemlite does not support group_size={group_size}; expected {_GROUP} or more")
    from gemlite.helper import A16W4_HQQ_INT

    quantized = rounded(weight, group_size, dtype)
    processor = A16W4_HQQ_INT(device=str(weight.device), dtype=dtype)
    layer = processor.from_weights(quantized.codes, quantized.scale, quantized.zero_points())
    return layer, lambda: layer_weight(layer), layer.W_q.nbytes + layer.scales.nbytes + layer.zeros.nbytes


def layer_weight(layer: Any) -> Tensor:
    """The weight (N, K) float64 of a layer's `W_q` (K / 8, N) int32, `scales` and `zeros` (G, N)."""
    words, scale, zero = layer.W_q, layer.scales.double(), layer.zeros.double()
    parts = [words >> 4 * place & 0xF for place in range(layer.elements_per_sample)]
    codes = torch.stack(parts, 1).view(scale.shape[0], -1, scale.shape[1]).double()
    shifted = layer.W_group_mode == 4  # the layer then stores -zero * scale as zeros; not with one group per row
    decoded: Tensor = codes * scale[:, None] + zero[:, None] if shifted else (codes - zero[:, None]) * scale[:, None]
    return decoded.view(-1, scale.shape[1]).t()
