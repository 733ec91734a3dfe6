"""torch's int4 kernels: tinygemm on a GPU, and that of CPUs as `harness.kernels.cpu_int4` runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.core import IntQTensor
from harness.kernels import cpu_int4
from harness.kernels.bench.peers.base import Built, check_device, check_dtype, check_group, check_multiple, rounded

GROUPS = (32, 64, 128, 256)
_MID_CODE = 8
_INNER_K_TILES = 8  # tinygemm's; all its users choose 8, which gives the widest load
_K_TILE = 16
_N_TILE = 8
_CPU_ROWS = 16


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """tinygemm's aten._weight_int4pack_mm: weight = (code - 8) * scale + zero, in pairs (G, N, 2) bfloat16."""
    check_device("torch int4pack", weight, ("cuda", "cpu"))
    check_dtype("torch int4pack", dtype, (torch.bfloat16,))
    check_group("torch int4pack", weight, group_size, GROUPS)
    if weight.device.type == "cpu":
        check_multiple("torch int4pack", weight, _CPU_ROWS, 1)
        return _on_cpu(rounded(weight, group_size, dtype))
    check_multiple("torch int4pack", weight, _N_TILE, _INNER_K_TILES * _K_TILE)
    halves, pairs = parts(rounded(weight, group_size, dtype))
    packed = torch.ops.aten._convert_weight_to_int4pack(halves, _INNER_K_TILES)

    def call(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.aten._weight_int4pack_mm(inputs, packed, group_size, pairs)
        return outputs

    return call, lambda: decoded_parts(halves, pairs), packed.nbytes + pairs.nbytes


def _on_cpu(weight: IntQTensor) -> Built:
    """As a CPU ran int4 before this project had kernels: torch's kernel for few rows of x, decoding for many."""
    kernel = cpu_int4.CpuInt4(weight)
    halves, pairs = parts(weight)
    return lambda inputs: kernel(inputs, None), lambda: decoded_parts(halves, pairs), halves.nbytes + pairs.nbytes


def parts(weight: IntQTensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K / 2) uint8 with the even column in the upper half of a byte, and pairs (G, N, 2) bfloat16."""
    codes, scale = weight.codes, weight.scale.float()
    halves = codes[:, ::2] << 4 | codes[:, 1::2]
    pairs = torch.stack([scale, (_MID_CODE - weight.zero_points()) * scale], -1).to(torch.bfloat16)
    return halves, pairs.transpose(0, 1).contiguous()


def decoded_parts(halves: Tensor, pairs: Tensor) -> Tensor:
    """The weight (N, K) float64 that the results of `parts` represent."""
    rows = halves.shape[0]
    codes = torch.stack([halves >> 4, halves & 0xF], -1).view(rows, pairs.shape[0], -1)
    scale, zero = pairs.double().transpose(0, 1).unbind(-1)
    return ((codes.double() - _MID_CODE) * scale[..., None] + zero[..., None]).view(rows, -1)
