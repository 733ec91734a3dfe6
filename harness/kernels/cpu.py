"""The kernel rules for CPUs; `harness.kernels.table` tries them in order."""

from __future__ import annotations

import torch

from harness.core import IntQTensor
from harness.core.formats import InputQuantizer
from harness.kernels import cpu_int4, cpu_int8, cpu_w8a8
from harness.kernels.base import Kernel


def _w8a8(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    if inputs is None or not cpu_w8a8.supports(weight, inputs, dtype):
        return None
    return cpu_w8a8.build(weight, inputs)


def _int8(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return cpu_int8.CpuInt8(weight) if cpu_int8.supports(weight, dtype) else None


def _int4(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return cpu_int4.CpuInt4(weight) if cpu_int4.supports(weight, dtype) else None


RULES = (_w8a8, _int8, _int4)
