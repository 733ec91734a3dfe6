"""Which kernel runs a weight: one table, read from the top.

A rule holds for a device and a kind of format; its `make` gives the kernel, or None where the weight's shape, groups or
dtype are not for it, and the next rule is asked. Where none holds, the weight is decoded at every call (`reference`).
Within a kernel, the number of rows decides the path; its module says where.

    device  codes   inputs            kernel           rows of x
    cuda    4       float16, bfloat16 triton_w4a16     few: split-K; many: tensor cores; most: decode and cuBLAS
    cuda    8       float16, bfloat16 triton_w8a16     likewise
    cuda    8       int8              triton_w8a8      few: split-K; many: tensor cores
    cuda    8       int8, outliers    triton_llm_int8  likewise
    cpu     4       bfloat16          cpu_w4a16        few: torch's int4 kernel; many: decode and matmul
    cpu     8       bfloat16          cpu_w8a16        few: torch's int8 kernel; many: cast and matmul
    cpu     8       int8              cpu_w8a8         (small weights: torch's int8 product; large: oneDNN's)
    cpu     8       int8, outliers    cpu_llm_int8     torch's int8 product, outlier columns apart
    any     2 to 8  any               reference        decode in slabs of rows and matmul
    any     vectors any               additive         few: a table of products; many: likewise (harness.core.additive)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from harness.core.activation import InputQuantizer
from harness.core.qtensor import IntQTensor, PermutedQTensor, QTensor
from harness.kernels import cpu_int4, cpu_int8, cpu_w8a8
from harness.kernels.base import Kernel
from harness.kernels.reordered import Reordered

_SHARED = ("base", "reordered", "table")
_TRITON = ("decode", "int8_kernels", "int8_matmul", "int8_rows", "matmul", "tiles", "tune", "w4a16", "w8a8")
# Modules whose source decides what a run on a device gives.
MODULES = {"cpu": (*_SHARED, "cpu_int4", "cpu_int8", "cpu_w8a8"), "cuda": (*_SHARED, *_TRITON)}

Make = Callable[[IntQTensor, InputQuantizer | None, torch.dtype], Kernel | None]


def choose(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """The kernel that runs `weight` for inputs of `dtype`; None where it is decoded at every call.

    `inputs` quantizes them first, unless the kernel does it itself.
    """
    if isinstance(weight, PermutedQTensor):
        base = choose(weight.base, inputs, dtype, device)
        return None if base is None else Reordered(base, weight.order)
    if not isinstance(weight, IntQTensor):
        return None
    found = (make(weight, inputs, dtype) for make in _RULES.get(device.type, ()))
    return next((kernel for kernel in found if kernel is not None), None)


def _cpu_w8a8(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    if inputs is None or not cpu_w8a8.supports(weight, inputs, dtype):
        return None
    return cpu_w8a8.build(weight, inputs)


def _cpu_int8(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return cpu_int8.CpuInt8(weight) if cpu_int8.supports(weight, dtype) else None


def _cpu_int4(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return cpu_int4.CpuInt4(weight) if cpu_int4.supports(weight, dtype) else None


def _triton_int(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels import w4a16

    return w4a16.TritonInt(weight, dtype) if w4a16.supports(weight, dtype) else None


def _triton_w8a8(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels import w8a8

    return w8a8.TritonW8A8(weight, inputs, dtype) if inputs and w8a8.supports(weight, inputs, dtype) else None


_RULES: dict[str, tuple[Make, ...]] = {
    "cuda": (_triton_w8a8, _triton_int) if importlib.util.find_spec("triton") else (),
    "cpu": (_cpu_w8a8, _cpu_int8, _cpu_int4),
}
