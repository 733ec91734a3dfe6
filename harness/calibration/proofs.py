"""When two results count as the same: their relative error, and its limit for each dtype and kind of proof."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PROBE_TOKENS = 32  # enough to prove a rewrite, and cheap compared with calibration

Limits = Mapping[torch.dtype, float]

# Logits from replaying the blocks one by one, compared with the model's logits: the same kernels run.
SAME_LOGITS: Limits = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# A block's output, or the logits, before and after a rewrite that keeps the function.
SAME_FUNCTION: Limits = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# The logits before and after a rotation, which is exact up to rounding.
SAME_TURNED: Limits = {**SAME_FUNCTION, torch.float32: 1e-4}
SAME_NLL = 1e-6  # nll of the divergence pass and the perplexity pass, which use the same arithmetic


def relative_error(tensor: Tensor, exact: Tensor) -> float:
    """|tensor - exact| / |exact| in the Frobenius norm, computed in float32, or in float64 if `exact` is float64."""
    dtype = torch.promote_types(exact.dtype, torch.float32)
    difference = (tensor.to(exact.dtype) - exact).to(dtype).norm()
    return float(difference / exact.to(dtype).norm().clamp(min=torch.finfo(dtype).tiny))


def within(error: float, limit: float) -> bool:
    """Whether an error is at most `limit`; False for NaN."""
    return error <= limit
