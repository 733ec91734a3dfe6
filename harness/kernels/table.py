"""The table that chooses the kernel of a weight: the first rule that applies is used.

A rule belongs to a device type and a kind of format. It returns a kernel, or None if it does not support the shape, the
groups or the dtype of the weight; then the next rule is tried. If no rule applies, the weight is decoded at every call
(`reference`). Inside a kernel, the number of rows of x selects the path; the limits are in the kernel's module.

    device  codes   inputs            kernel           rows of x
    cuda    4       float16, bfloat16 triton_w4a16     few: split-K; many: tensor cores; most: decode and cuBLAS
    cuda    8       float16, bfloat16 triton_w8a16     likewise
    cuda    floats  float16, bfloat16 triton_e2m1, ... likewise (FP8, MXFP8, MXFP6, MXFP4, NVFP4)
    cuda    E4M3    E4M3              scaled_mm        torch's product of 8-bit floats (compute capability from 8.9)
    cuda    8       int8              triton_w8a8      few: split-K; many: tensor cores
    cuda    8       int8, outliers    triton_llm_int8  likewise
    cpu     2 to 8  at most 8 bits    native_w*a*      integer products; one scale per row of the weight
    cpu     2 to 8  8 bits, outliers  native_llm_int8  likewise; outlier channels in float32
    cpu     2 to 8  float32, bfloat16 native_int*      few: decoded in registers; many: in tiles in the cache
    cpu     levels  float32, bfloat16 native_levels    likewise (NF4, FP4)
    cpu     floats  float32, bfloat16 native_e*m*      likewise (FP8, FP6, and those of up to 5 bits)
    cpu     E8P     float32, bfloat16 native_e8p       few: points read and multiplied; many: in tiles in the cache
    cpu     vectors float32, bfloat16 native_additive  likewise (codebooks of vectors of 8)
            without the native library:
    cpu     4       bfloat16          cpu_w4a16        few: torch's int4 kernel; many: decode and matmul
    cpu     8       bfloat16          cpu_w8a16        few: torch's int8 kernel; many: cast and matmul
    cpu     8       int8              cpu_w8a8         (small weights: torch's int8 product; large: oneDNN's)
    cpu     8       int8, outliers    cpu_llm_int8     torch's int8 product, outlier columns separately
    any     2 to 8  any               reference        decode in slabs of rows and matmul
    any     vectors any               additive         few: a table of products; many: decode (core.formats.additive)
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from harness.core import QTensor
from harness.core.formats import InputQuantizer, PermutedQTensor
from harness.kernels.base import Kernel
from harness.kernels.reordered import Reordered

Make = Callable[[QTensor, InputQuantizer | None, torch.dtype], Kernel | None]


def choose(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """The kernel that runs `weight` for inputs of `dtype`, or None if the weight is decoded at every call.

    `inputs` quantizes the inputs before the kernel, unless the kernel does it itself.
    """
    if isinstance(weight, PermutedQTensor):
        base = choose(weight.base, inputs, dtype, device)
        return None if base is None else Reordered(base, weight.order)
    kernels = (make(weight, inputs, dtype) for make in rules(device.type))
    return next((kernel for kernel in kernels if kernel is not None), None)


@functools.cache
def rules(device_type: str) -> tuple[Make, ...]:
    """The rules of a device type, in the order in which they are tried: `RULES` of the module with the same name.

    The module is imported by name, so that the kernels of one device are not part of the code of runs on another.
    """
    try:
        module = importlib.import_module(f"{__package__}.{device_type}")
    except ModuleNotFoundError:
        return ()
    device_rules: tuple[Make, ...] = module.RULES
    return device_rules
