"""fbgemm-gpu-genai 1.6.0: CUTLASS kernels for GPUs of compute capability 9.0."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.kernels.bench.peers.base import Built, check_device, check_dtype, check_group, require

_GROUP = 128


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """FBGEMM's CUTLASS kernel for preshuffled weights: weight = code * scale + zero, code from -8 to 7."""
    require("fbgemm_gpu", "fbgemm-gpu-genai")
    check_device("fbgemm", weight, ("cuda",))
    check_dtype("fbgemm", dtype, (torch.bfloat16,))
    check_group("fbgemm", weight, group_size)
    if group_size < _GROUP:
        raise ValueError(f"fbgemm does not support group_size={group_size}; expected {_GROUP} or more")
    capability = torch.cuda.get_device_capability(weight.device)
    if capability != (9, 0):
        raise ValueError(f"fbgemm does not support a GPU of compute capability {capability}; expected (9, 0)")
    from fbgemm_gpu.experimental.gen_ai.quantize import int4_row_quantize_zp, pack_int4

    codes, *floats = int4_row_quantize_zp(weight, group_size)  # (N, K) int8, and two tensors (G, N) float32
    scale, zero = (part.to(dtype) for part in floats)
    shuffled, stored_scale = torch.ops.fbgemm.preshuffle_i4(pack_int4(codes), scale)

    def call(inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.fbgemm.bf16i4bf16_shuffled(inputs, shuffled, stored_scale, zero)
        return outputs

    return call, lambda: weight_of(codes, scale, zero), shuffled.nbytes + stored_scale.nbytes + zero.nbytes


def weight_of(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weight (N, K) float64 of signed codes (N, K), scale and zero (G, N)."""
    groups = codes.view(codes.shape[0], scale.shape[0], -1).double()
    return (groups * scale.double().t()[..., None] + zero.double().t()[..., None]).view(codes.shape)
