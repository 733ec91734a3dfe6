"""The kernel rules for NVIDIA GPUs; `harness.kernels.table` tries them in order. Without triton, torch's is left."""

from __future__ import annotations

import importlib.util

import torch

from harness.core import FloatQTensor, IntQTensor, QTensor
from harness.core.formats import InputQuantizer
from harness.kernels.base import Kernel


def _scaled_mm(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels import scaled_mm

    if inputs is None or not isinstance(weight, FloatQTensor) or not scaled_mm.supports(weight, inputs, dtype):
        return None
    return scaled_mm.ScaledMM(weight, inputs, dtype)


def _w8a8(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels.triton import w8a8

    if inputs is None or not isinstance(weight, IntQTensor) or not w8a8.supports(weight, inputs, dtype):
        return None
    return w8a8.TritonW8A8(weight, inputs, dtype)


def _weight_only(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels.triton import w4a16

    return w4a16.TritonInt(weight, dtype) if isinstance(weight, IntQTensor) and w4a16.supports(weight, dtype) else None


def _small_floats(weight: QTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels.triton import small_floats

    if not isinstance(weight, FloatQTensor) or not small_floats.supports(weight, dtype):
        return None
    return small_floats.TritonFloat(weight, dtype)


_TRITON = (_w8a8, _weight_only, _small_floats) if importlib.util.find_spec("triton") else ()
RULES = (_scaled_mm, *_TRITON)
