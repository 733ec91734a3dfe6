"""W8A8: int8 weights, and inputs quantized to int8 at each call; LLM.int8()'s outlier channels stay floats.

    y = codes_x codes_w^T * scale_x * scale_w + bias        scale_x per token, per sequence, or calibrated

A linear needs three launches (quantize, matmul and, for few rows, the sum of the parts of K). None waits for the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.core import IntQTensor
from harness.core.formats import InputQuantizer
from harness.kernels.base import Kernel
from harness.kernels.triton import int8_matmul as matmul
from harness.kernels.triton import int8_rows as rows
from harness.kernels.triton.case import Case

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_K = (2**31 - 1) // 2**14  # products of two codes reach 2^14; their sum must fit into an int32
_SIGN_BIT = 0x80


def supports(weight: IntQTensor, quantizer: InputQuantizer, dtype: torch.dtype) -> bool:
    """Whether TritonW8A8 computes exactly this format: symmetric 8-bit codes, one scale per row or tensor, no clip."""
    formats = (weight.fmt, quantizer.integers)
    return (
        all(fmt is not None and fmt.bits == 8 and fmt.symmetric for fmt in formats)
        and quantizer.fmt.clip == 1  # the kernel takes the scale of a row from its largest magnitude
        and weight.scale.shape[1] == 1
        and weight.shape[1] <= _MAX_K
        and dtype in _DTYPES
    )


class TritonW8A8(Kernel):
    """One int8 weight (N, K) with its stored scales; inputs are quantized in the format of `quantizer`."""

    weight: Tensor
    scale: Tensor
    quantizes_inputs = True

    def __init__(self, weight: IntQTensor, quantizer: InputQuantizer, dtype: torch.dtype) -> None:
        """Raises: ValueError if `supports` returns False."""
        super().__init__(weight.shape)
        if not supports(weight, quantizer, dtype):
            raise ValueError(
                f"kernel=triton_w8a8 does not support {weight.fmt} with {quantizer.fmt} in {dtype}; expected symmetric "
                f"8-bit weights and activations, one scale per row or tensor, clip=1, and at most {_MAX_K} inputs"
            )
        self.name = "triton_w8a8" if quantizer.fmt.threshold is None else "triton_llm_int8"
        self.quantizer, fmt = quantizer, quantizer.integers
        assert fmt is not None
        self.fmt = fmt
        self.register_buffer("weight", (weight.codes ^ _SIGN_BIT).view(torch.int8))
        self.register_buffer("scale", weight.scale)

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        outliers, preset_scale = self._ranges(inputs)
        floats = inputs.reshape(-1, self.shape[1])
        codes, scale = rows.quantize_rows(floats, self.fmt.steps, preset_scale, outliers)
        float_operands = (None, None) if outliers is None else (floats.contiguous(), outliers)
        out: Tensor = matmul.int8_matmul(codes, scale, self.weight, self.scale, bias, inputs.dtype, *float_operands)
        return out.view(*inputs.shape[:-1], self.shape[0])

    def _ranges(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Outlier channels (B, K) if the format has a threshold, and scales (S,) unless each row gets its own.

        Both follow from the largest magnitude of each channel in a sequence, so that x is read only once.
        """
        fmt = self.fmt
        if not fmt.dynamic:
            return None, self.quantizer.scale.float().reshape(1)
        if fmt.granularity == "token" and fmt.threshold is None:
            return None, None
        tokens = inputs if inputs.dim() > 1 else inputs[None]
        largest = torch.linalg.vector_norm(tokens, math.inf, -2, keepdim=True).float()
        outliers = None
        if fmt.threshold is not None:
            outliers = largest >= fmt.threshold
            largest = largest.masked_fill(outliers, 0)
            outliers = outliers.reshape(-1, self.shape[1])
        if fmt.granularity == "token":
            return outliers, None
        absmax = largest.reshape(len(inputs) if inputs.dim() > 2 else 1, -1).amax(1)
        return outliers, fmt.symmetric_scale(absmax)


def cases() -> list[Case]:
    """Every kernel that a W8A8 linear launches."""
    return [*rows.cases(), *matmul.cases()]
