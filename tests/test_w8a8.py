"""The int8 kernels in Triton's interpreter: codes against InputQuantizer's, results against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.core.activation import InputQuantizer
from harness.core.qtensor import IntQTensor, round_to_nearest
from harness.core.scheme import ActivationFormat, WeightFormat
from harness.kernels import int8_matmul
from harness.kernels.int8_rows import quantize_rows
from harness.kernels.w8a8 import TritonW8A8, supports

ROWS = WeightFormat(bits=8, symmetric=True, grid="narrow", scale_dtype="float32")
TOKENS = ActivationFormat(bits=8, symmetric=True, grid="narrow")
FULL = ActivationFormat(bits=8, symmetric=True)
SEQUENCES = ActivationFormat(bits=8, symmetric=True, grid="narrow", granularity="tensor")
STATIC = ActivationFormat(bits=8, symmetric=True, grid="narrow", granularity="tensor", dynamic=False)
OUTLIERS = ActivationFormat(bits=8, symmetric=True, grid="narrow", threshold=6.0)
EPS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs (..., K) whose tokens differ in size by up to 400 times."""
    sizes = torch.linspace(-3, 3, torch.Size(shape[:-1]).numel()).exp().view(*shape[:-1], 1)
    return (torch.randn(shape) * sizes).to(dtype)


def weights(rows: int, columns: int, fmt: WeightFormat = ROWS) -> IntQTensor:
    """A weight (N, K) with another scale in each row."""
    return round_to_nearest(torch.randn(rows, columns) * torch.linspace(-2, 2, rows).exp()[:, None], fmt)


def quantizer(fmt: ActivationFormat) -> InputQuantizer:
    return InputQuantizer(fmt, None if fmt.dynamic else (torch.tensor(-4.0), torch.tensor(5.0)))


def exact(weight: IntQTensor, rounding: InputQuantizer, x: Tensor, bias: Tensor | None) -> Tensor:
    """x' W'^T + b in float64, with x rounded as `rounding` does it."""
    y = rounding(x.float()).double() @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Each row, and each column, by its own norm: sizes differ from token to token and from output to output."""
    assert found.dtype == dtype
    error = (found.double() - expected).flatten(0, -2)
    expected = expected.flatten(0, -2)
    for axis in (0, 1):
        assert bool((error.norm(dim=axis) <= EPS[dtype] * expected.norm(dim=axis)).all())


def kernel_codes(x: Tensor, rounding: InputQuantizer) -> tuple[Tensor, Tensor]:
    from harness.core.grid import symmetric_steps

    return quantize_rows(x, symmetric_steps(rounding.fmt), None, None)


@pytest.mark.parametrize("fmt", [TOKENS, FULL], ids=["narrow", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 96), (3, 130), (17, 576)])
def test_codes_are_the_input_quantizer_s(fmt: ActivationFormat, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = inputs(*shape, dtype=dtype)
    x[-1, 5:] = 0
    rounding = quantizer(fmt)
    codes, scale = kernel_codes(x, rounding)
    expected, expected_scale, _ = rounding.encode(x)
    assert torch.equal(scale, expected_scale[:, 0])
    steps = x.double() / expected_scale.double()
    tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert torch.equal(codes.int()[~tie], (expected.int() - 128)[~tie])
    assert bool(((codes.int() - expected.int() + 128).abs()[tie] <= 1).all())
    assert bool(tie.float().mean() < 0.01)
