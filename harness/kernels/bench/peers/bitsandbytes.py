"""bitsandbytes 0.50.2: NF4."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from harness.kernels.bench.peers.base import HALVES, Built, check_device, check_dtype, check_multiple, require

_BLOCK = 64


def build(weight: Tensor, group_size: int, dtype: torch.dtype) -> Built:
    """bitsandbytes' NF4 in blocks of 64 with float32 scales; it has no groups and ignores `group_size`."""
    require("bitsandbytes", "bitsandbytes")
    check_device("bitsandbytes nf4", weight, ("cuda", "cpu"))
    check_dtype("bitsandbytes nf4", dtype, (*HALVES, torch.float32))
    if weight.device.type == "cpu":  # 0.50.2 decodes a block that spans rows wrongly on a CPU
        check_multiple("bitsandbytes nf4", weight, 1, _BLOCK)
    import bitsandbytes

    matmul: Any = bitsandbytes.matmul_4bit  # type: ignore[attr-defined]  # it does not declare this export
    quantized, float32_state = bitsandbytes.functional.quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, compress_statistics=False, quant_type="nf4"
    )
    state = copy.copy(float32_state)
    state.dtype = dtype  # the matmul decodes to it; `float32_state` keeps float32

    def call(inputs: Tensor) -> Tensor:
        outputs: Tensor = matmul(inputs, quantized, state)
        return outputs

    def decoded() -> Tensor:
        values: Tensor = bitsandbytes.functional.dequantize_4bit(quantized, float32_state)
        return values.double()

    return call, decoded, quantized.nbytes + float32_state.absmax.nbytes
