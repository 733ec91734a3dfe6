"""What tests of CPU kernels share: weights, and comparisons with float64 arithmetic on the decoded weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import (
    FloatQTensor,
    FloatWeight,
    IntActivation,
    IntQTensor,
    IntWeight,
    QTensor,
    round_to_nearest,
)
from harness.core.formats import InputQuantizer
from harness.kernels.base import Kernel
from harness.kernels.native import library

CPU = torch.device("cpu")
LEVELS = ("plain", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
TOKENS = (1, 2, 3, 8, 9, 30)  # of inputs: below and above the limits at which the native kernels change their path
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of relative errors
INPUTS: dict[str, dict[str, Any]] = {
    "token": {},
    "full": {"grid": "full"},
    "clip": {"clip": 0.8},
    "tensor": {"granularity": "tensor"},
    "static": {"granularity": "tensor", "dynamic": False},
    "outliers": {"threshold": 2.5},
    "outliers of a tensor": {"threshold": 2.5, "granularity": "tensor"},
    "four bits": {"bits": 4},
}
built = pytest.mark.skipif(not library.available(), reason=f"the native library is {library.problem()}")


def uneven(rows: int, columns: int, fmt: IntWeight) -> IntQTensor:
    """A weight whose groups differ in scale and offset, so that a wrong group index is detected."""
    spread = torch.rand(fmt.groups((rows, columns))).mul(4).exp()[..., None]
    offset = torch.randn(fmt.groups((rows, columns)))[..., None]
    groups = torch.randn(*spread.shape[:2], columns * rows // spread[..., 0].numel()) + offset
    return round_to_nearest((groups * spread).view(rows, columns) * 0.01, fmt)


def uneven_floats(rows: int, columns: int, fmt: FloatWeight) -> FloatQTensor:
    """Likewise in small floats: 16 inputs of a row differ in scale from the next ones, and from other rows."""
    spread = torch.rand(rows, -(-columns // 16)).mul(4).exp().repeat_interleave(16, 1)[:, :columns]
    return round_to_nearest(torch.randn(rows, columns) * spread, fmt)


def quantizer(kind: str, low: float = -2.0) -> InputQuantizer:
    """The quantizer of a kind of INPUTS; inputs in [low, 3] have been observed, if it is static."""
    fmt = IntActivation(**{"bits": 8, "symmetric": True, "grid": "narrow", **INPUTS[kind]})
    return InputQuantizer(fmt, None if fmt.dynamic else (torch.tensor(low), torch.tensor(3.0)))


def error(outputs: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((outputs.double() - expected).norm() / expected.norm())


def exact(weight: QTensor, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
    """The outputs in float64."""
    outputs = inputs.double() @ weight.dequantize(torch.float64).t()
    return outputs if bias is None else outputs + bias.double()


def check(kernel: Kernel, weight: QTensor, dtype: torch.dtype, tokens: int) -> None:
    """Compare a kernel with float64 arithmetic on its weight, for fresh inputs and with a bias."""
    inputs, bias = torch.randn(1, tokens, weight.shape[1]).to(dtype), torch.randn(weight.shape[0]).to(dtype)
    outputs, expected = kernel(inputs, bias), exact(weight, inputs, bias)
    assert outputs.shape == expected.shape
    assert outputs.dtype == dtype
    assert error(outputs, expected) < BOUNDS[dtype]


def check_threads(kernel: Kernel) -> None:
    """Check that sums of few and of many rows of inputs do not depend on the number of threads."""
    threads, outputs = torch.get_num_threads(), list[Tensor]()
    inputs = [torch.randn(tokens, kernel.shape[1]) for tokens in (1, 40)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(torch.cat([kernel(part, None) for part in inputs]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
