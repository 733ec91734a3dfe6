"""The kernel rules for CPUs; `harness.kernels.table` tries them in order.

Where the native library is not built, torch's kernels run.
"""

from __future__ import annotations

import torch

from harness.core import IntQTensor, QTensor
from harness.core.formats import InputQuantizer
from harness.kernels import cpu_int4, cpu_int8, cpu_w8a8
from harness.kernels.base import Kernel
from harness.kernels.native import additive, grouped, incoherent, int8


def _native_int8(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return int8.Int8Linear.of(weight, inputs) if inputs and int8.supports(weight, inputs, dtype) else None


def _w8a8(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    if inputs is None or not isinstance(weight, IntQTensor) or not cpu_w8a8.supports(weight, inputs, dtype):
        return None
    return cpu_w8a8.build(weight, inputs)


def _native(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return grouped.build(weight) if grouped.supports(weight, dtype) else None


def _additive(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return additive.AdditiveLinear(weight) if additive.supports(weight, dtype) else None


def _incoherent(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return incoherent.IncoherentLinear(weight) if incoherent.supports(weight, dtype) else None


def _int8(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return cpu_int8.CpuInt8(weight) if isinstance(weight, IntQTensor) and cpu_int8.supports(weight, dtype) else None


def _int4(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    return cpu_int4.CpuInt4(weight) if isinstance(weight, IntQTensor) and cpu_int4.supports(weight, dtype) else None


RULES = (_native_int8, _w8a8, _native, _additive, _incoherent, _int8, _int4)
