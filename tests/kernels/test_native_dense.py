"""The native kernel of float linears, and the module that uses it, against float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.nn import DenseLinear
from tests.support.kernels import BOUNDS, TOKENS, built, error

pytestmark = built


def linear(rows: int, columns: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(48, 64), (37, 77), (16, 15), (1, 1), (70, 200)])
def test_any_shape(level: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    float_linear = linear(*shape, dtype, bias=shape[0] != 48)
    dense = DenseLinear.of(float_linear)
    for tokens in TOKENS:
        inputs = torch.randn(1, tokens, shape[1]).to(dtype)
        bias = 0 if float_linear.bias is None else float_linear.bias.double()
        outputs, expected = dense(inputs), inputs.double() @ float_linear.weight.double().t() + bias
        assert outputs.shape == expected.shape
        assert outputs.dtype == dtype
        assert error(outputs.detach(), expected.detach()) < BOUNDS[dtype]


def test_many_rows_have_the_bits_of_torch() -> None:
    float_linear, inputs = linear(64, 96, torch.float32), torch.randn(40, 96)
    assert torch.equal(DenseLinear.of(float_linear)(inputs), float_linear(inputs))


def test_parameters_are_shared() -> None:
    float_linear = linear(8, 16, torch.float32)
    dense = DenseLinear.of(float_linear)
    assert dense.weight is float_linear.weight
    assert dense.bias is float_linear.bias


def test_no_rows() -> None:
    assert DenseLinear.of(linear(8, 16, torch.float32))(torch.zeros(2, 0, 16)).shape == (2, 0, 8)


def test_what_it_does_not_run() -> None:
    assert DenseLinear.supports(linear(8, 16, torch.bfloat16))
    assert not DenseLinear.supports(linear(8, 16, torch.float64))
    assert not DenseLinear.supports(DenseLinear.of(linear(8, 16, torch.float32)))
    assert not DenseLinear.supports(nn.Identity())


@pytest.mark.parametrize("wrong", ["columns", "dtype"])
def test_inputs_that_do_not_fit_are_refused(wrong: str) -> None:
    inputs = torch.randn(2, 15) if wrong == "columns" else torch.randn(2, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="expected"):
        DenseLinear.of(linear(8, 16, torch.float32))(inputs)


def test_the_operator_compiles() -> None:
    arguments = (torch.randn(3, 16), torch.randn(8, 16), torch.randn(8))
    torch.library.opcheck(torch.ops.ptqbench_native.dense_linear, arguments)
