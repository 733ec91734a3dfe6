"""The native kernels for quantized inputs against float64 arithmetic on rounded inputs and the decoded weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.core import IntActivation, IntWeight
from harness.core.formats import InputQuantizer
from harness.kernels.native import int8
from harness.kernels.table import choose
from harness.nn import QuantLinear
from tests.support.kernels import BOUNDS, CPU, INPUTS, built, error, quantizer, uneven

SHAPES = ((1, 1), (2, 3), (7,), (1, 30))  # of the tokens


@built
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_format_of_inputs(level: str, kind: str, dtype: torch.dtype) -> None:
    weight, inputs = uneven(37, 80, IntWeight(bits=8, symmetric=True, grid="narrow")), quantizer(kind)
    kernel, bias = int8.Int8Linear.of(weight, inputs), torch.randn(37).to(dtype)
    for tokens in SHAPES:
        x = torch.randn(*tokens, 80).to(dtype)
        expected = inputs(x.float()).double() @ weight.dequantize(torch.float64).t() + bias.double()
        outputs = kernel(x, bias)
        assert outputs.shape == expected.shape
        assert outputs.dtype == dtype
        assert error(outputs, expected) < BOUNDS[dtype]


@built
@pytest.mark.parametrize("columns", [1, 17, 96])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"symmetric": True}])
def test_every_width_of_weights(level: str, bits: int, columns: int, options: dict[str, Any]) -> None:
    weight, inputs = uneven(20, columns, IntWeight(bits=bits, **options)), quantizer("outliers")
    x = torch.randn(2, 13, columns)
    expected = inputs(x).double() @ weight.dequantize(torch.float64).t()
    outputs = int8.Int8Linear.of(weight, inputs)(x, None)
    assert error(outputs, expected) < 1e-6


@built
@pytest.mark.parametrize("tokens", [17, 33, 70, 600])
@pytest.mark.parametrize("columns", [32, 544, 2080, 4128])
def test_many_rows_of_stacks_and_tiles_that_end_anywhere(level: str, columns: int, tokens: int) -> None:
    weight, inputs = uneven(37, columns, IntWeight(bits=8, symmetric=True, grid="narrow")), quantizer("token")
    x = torch.randn(tokens, columns)
    expected = inputs(x).double() @ weight.dequantize(torch.float64).t()
    assert error(int8.Int8Linear.of(weight, inputs)(x, None), expected) < 1e-6


@built
def test_codes_of_inputs_are_those_of_the_quantizer() -> None:
    """With an identity as weight, outputs are the rounded inputs: equal to the bit, also where a value is a tie."""
    identity = uneven(64, 64, IntWeight(bits=8, symmetric=True, grid="narrow"))
    identity.scale.fill_(1.0)
    identity.qweight.copy_((torch.eye(64, dtype=torch.uint8) + 128).view(-1))
    for kind in ("token", "tensor", "clip", "full"):
        x = torch.cat([torch.randn(40, 64), torch.randint(-255, 256, (40, 64)) / 2])
        assert torch.equal(int8.Int8Linear.of(identity, quantizer(kind))(x, None), quantizer(kind)(x))


@built
def test_long_sums_are_exact() -> None:
    weight = uneven(16, 40000, IntWeight(bits=8, granularity="tensor", symmetric=True, grid="narrow"))
    weight.qweight.fill_(255)
    outputs = int8.Int8Linear.of(weight, quantizer("token"))(torch.ones(1, 40000), None)
    expected = 40000 * 127 * float(weight.scale)
    torch.testing.assert_close(outputs, torch.full((1, 16), expected), rtol=1e-6, atol=0)


@built
def test_many_rows_and_inputs_in_several_parts(level: str) -> None:
    weight, inputs, x = uneven(40, 1100, IntWeight(bits=4)), quantizer("outliers"), torch.randn(1, 530, 1100)
    expected = inputs(x).double() @ weight.dequantize(torch.float64).t()
    assert error(int8.Int8Linear.of(weight, inputs)(x, None), expected) < 1e-6


@built
def test_zeros_and_no_rows() -> None:
    weight = uneven(16, 32, IntWeight(bits=8, symmetric=True, grid="narrow"))
    for kind in INPUTS:
        kernel = int8.Int8Linear.of(weight, quantizer(kind))
        assert not kernel(torch.zeros(1, 3, 32), None).any()
        assert kernel(torch.zeros(1, 0, 32), None).shape == (1, 0, 16)


@built
@pytest.mark.parametrize(
    ("fmt", "inputs", "name"),
    [
        (IntWeight(bits=8), IntActivation(bits=8, symmetric=True), "native_w8a8"),
        (IntWeight(bits=4), IntActivation(bits=8, symmetric=True), "native_w4a8"),
        (IntWeight(bits=8), IntActivation(bits=8, symmetric=True, threshold=6.0), "native_llm_int8"),
        (IntWeight(bits=8), IntActivation(bits=8), "native_int8"),  # inputs are rounded before it
        (IntWeight(bits=4, zero_point="float"), IntActivation(bits=8, symmetric=True), "native_int4"),
        (IntWeight(bits=4, granularity="group", group_size=16), IntActivation(bits=4), "native_int4"),
    ],
)
def test_the_table(fmt: IntWeight, inputs: IntActivation, name: str) -> None:
    weight, rounding, x = uneven(32, 64, fmt), InputQuantizer(inputs), torch.randn(3, 64)
    kernel = choose(weight, rounding, torch.float32, CPU)
    assert kernel is not None
    assert kernel.name == name
    expected = rounding(x).double() @ weight.dequantize(torch.float64).t()
    outputs = QuantLinear(weight, None, torch.float32, rounding).pack()(x)
    assert error(outputs, expected) < 1e-6


@built
def test_the_operator_compiles() -> None:
    kernel = int8.Int8Linear.of(uneven(32, 64, IntWeight(bits=8)), quantizer("token"))
    stored = (kernel.qweight, kernel.scale, kernel.zero_point, None, None)
    arguments = (torch.randn(3, 64), *stored, 1.0, 127.0, -128, 127, 0.0, False, 32)
    torch.library.opcheck(torch.ops.ptqbench_native.int8_linear, arguments)


@pytest.mark.usefixtures("torch_kernels")
def test_without_the_library_other_kernels_run() -> None:
    assert not int8.supports(uneven(32, 64, IntWeight(bits=8)), quantizer("token"), torch.float32)
