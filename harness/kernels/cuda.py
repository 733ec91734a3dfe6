"""The kernel rules for NVIDIA GPUs; `harness.kernels.table` tries them in order. Without triton the list is empty."""

from __future__ import annotations

import importlib.util

import torch

from harness.core import IntQTensor
from harness.core.formats import InputQuantizer
from harness.kernels.base import Kernel


def _w8a8(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels.triton import w8a8

    return w8a8.TritonW8A8(weight, inputs, dtype) if inputs and w8a8.supports(weight, inputs, dtype) else None


def _weight_only(weight: IntQTensor, inputs: InputQuantizer | None, dtype: torch.dtype) -> Kernel | None:
    from harness.kernels.triton import w4a16

    return w4a16.TritonInt(weight, dtype) if w4a16.supports(weight, dtype) else None


RULES = (_w8a8, _weight_only) if importlib.util.find_spec("triton") else ()
