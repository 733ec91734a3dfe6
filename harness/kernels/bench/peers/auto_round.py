"""auto-round-lib 0.16.0 (module auto_round_kernel): BestLA's kernels for CPUs.

Its layers compute in float32 with inputs of other dtypes converted, and so does this. Asked for products in int8, it
gives the same results for asymmetric weights, so there is no row for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.kernels.bench.peers.base import Built, check_device, check_dtype, check_group, require, rounded

_FORMAT = ("auto", "int4", "fp32", True)  # the dtypes of products, codes and scales; asymmetric
_MID_CODE = 8


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """Signed codes (K, N), scales and zero points (G, N), packed by the library."""
    require("auto_round_kernel", "auto-round-lib")
    check_device("auto-round", weight, ("cpu",))
    check_dtype("auto-round", dtype, (torch.float32, torch.bfloat16))
    check_group("auto-round", weight, group_size)
    import auto_round_kernel

    rows, columns = weight.shape
    quantized = rounded(weight, group_size, torch.float32)
    codes, zero_points = (
        part.to(torch.int8).sub(_MID_CODE).t().contiguous() for part in (quantized.codes, quantized.zero_points())
    )
    scale = quantized.scale.t().contiguous()
    packed = auto_round_kernel.repack_quantized_weight(codes, scale, zero_points, group_size, *_FORMAT)

    def call(inputs: Tensor) -> Tensor:
        outputs: Tensor = auto_round_kernel.woqgemm_linear(inputs, packed, None, rows, columns, group_size, *_FORMAT)
        return outputs

    return call, lambda: quantized.dequantize(torch.float64), packed.nbytes
