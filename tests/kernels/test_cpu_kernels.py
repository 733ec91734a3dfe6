"""Torch's CPU kernels, which run without the native library, against float64 arithmetic, and the table of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.core import IntActivation, IntWeight
from harness.core.formats import InputQuantizer, PermutedQTensor
from harness.kernels import cpu_int4, cpu_int8, cpu_w8a8
from harness.kernels.base import Kernel
from harness.kernels.table import choose
from harness.nn import QuantLinear, resident_bytes
from tests.support.kernels import CPU, error, exact, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")

INT8_ROWS = IntWeight(bits=8, symmetric=True, grid="narrow")
vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")
ROWS = (1, 3, 65, 130)  # of inputs: below and above the limits at which the kernels change their path


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (80, 96), (576, 192), (592, 128)])
@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "group", "group_size": 32},
        {"granularity": "group", "group_size": 32, "symmetric": True, "grid": "narrow"},
        {"granularity": "group", "group_size": 32, "zero_point": "float"},
        {"granularity": "channel"},
        {"granularity": "tensor"},
    ],
)
def test_int4(tokens: int, rows: int, columns: int, options: dict[str, Any]) -> None:
    weight = uneven(rows, columns, IntWeight(bits=4, **options))
    kernel = choose(weight, None, torch.bfloat16, CPU)
    assert isinstance(kernel, cpu_int4.CpuInt4)
    inputs, bias = torch.randn(1, tokens, columns).bfloat16(), torch.randn(rows).bfloat16()
    outputs = kernel(inputs, bias)
    assert outputs.shape == (1, tokens, rows)
    assert outputs.dtype == torch.bfloat16
    assert error(outputs, exact(weight, inputs, bias)) < 0.006  # bfloat16: 2^-9 each for scale, zero and result


def test_int4_rows_of_several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = uneven(176, 64, IntWeight(bits=4, granularity="group", group_size=32))
    monkeypatch.setattr(cpu_int4, "_SLAB", 128)
    kernel, inputs = cpu_int4.CpuInt4(weight), torch.randn(100, 64).bfloat16()
    assert error(kernel(inputs, None), exact(weight, inputs)) < 0.006


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_int4_groups_of_the_format_may_span_several_of_the_kernel(size: int) -> None:
    weight = uneven(32, 1024, IntWeight(bits=4, granularity="group", group_size=size))
    kernel = choose(weight, None, torch.bfloat16, CPU)
    inputs = torch.randn(2, 1024).bfloat16()
    assert kernel is not None
    assert error(kernel(inputs, None), exact(weight, inputs)) < 0.006
    assert sum(buffer.nbytes for buffer in kernel.buffers()) == 32 * 1024 // 2 + 32 * 1024 // min(size, 256) * 4


def test_int4_rows_are_found_in_whatever_order_torch_packs_them() -> None:
    for rows in (16, 32, 48, 64, 80, 176):
        codes = torch.randint(0, 16, (rows, 32), dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        assert torch.equal(cpu_int4._centred(packed, 32), codes.t().bfloat16() - 8)


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("options", [{"symmetric": True}, {}, {"zero_point": "float"}, {"granularity": "tensor"}])
def test_int8_weights_alone(tokens: int, options: dict[str, Any]) -> None:
    weight = uneven(40, 112, IntWeight(bits=8, **options))
    kernel = choose(weight, None, torch.bfloat16, CPU)
    assert isinstance(kernel, cpu_int8.CpuInt8)
    inputs, bias = torch.randn(tokens, 112).bfloat16(), torch.randn(40).bfloat16()
    # The bound is wider because adding the shift cancels most of a large product.
    assert error(kernel(inputs, bias), exact(weight, inputs, bias)) < 0.01


ACTIVATIONS = {
    "token": IntActivation(bits=8, symmetric=True, grid="narrow"),
    "token full": IntActivation(bits=8, symmetric=True),
    "tensor": IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor"),
    "static": IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor", dynamic=False),
    "llm_int8": IntActivation(bits=8, symmetric=True, grid="narrow", threshold=6.0),
    "clipped": IntActivation(bits=8, symmetric=True, grid="narrow", clip=0.8),
    "clipped llm_int8": IntActivation(bits=8, symmetric=True, grid="narrow", threshold=6.0, clip=0.8),
    "no outlier": IntActivation(bits=8, symmetric=True, grid="narrow", threshold=1e9),
}


def quantizer(kind: str) -> InputQuantizer:
    fmt = ACTIVATIONS[kind]
    return InputQuantizer(fmt, None if fmt.dynamic else (torch.tensor(-9.0), torch.tensor(7.0)))


@vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 130)])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_int8_inputs(dtype: torch.dtype, shape: tuple[int, int], kind: str, granularity: Any) -> None:
    weight = uneven(48, 100, IntWeight(bits=8, symmetric=True, grid="narrow", granularity=granularity))
    inputs = torch.randn(*shape, 100) * torch.rand(*shape, 1).mul(2).exp()
    inputs[..., 7] *= 10  # above the threshold in most sequences
    inputs, rounding = inputs.to(dtype), quantizer(kind)
    kernel = choose(weight, rounding, dtype, CPU)
    assert kernel is not None
    assert kernel.quantizes_inputs
    assert kernel.name == ("cpu_w8a8" if rounding.fmt.threshold is None else "cpu_llm_int8")
    bias = torch.randn(48).to(dtype)
    expected = exact(weight, rounding(inputs.float()), bias)
    assert error(kernel(inputs, bias), expected) < (1e-5 if dtype == torch.float32 else 0.006)


@vnni
@pytest.mark.parametrize("kind", ["token", "tensor", "static"])
def test_a_large_weight_goes_to_onednn_and_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, bias = uneven(48, 100, INT8_ROWS), torch.randn(3, 5, 100), torch.randn(48)
    small = cpu_w8a8.build(weight, quantizer(kind))
    monkeypatch.setattr(cpu_w8a8, "MAX_PLAIN_WEIGHTS", 4799)
    large = cpu_w8a8.build(weight, quantizer(kind))
    assert type(small) is not type(large)
    torch.testing.assert_close(large(inputs, bias), small(inputs, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, None), (torch.bfloat16, "cpu_w8a16")])
@pytest.mark.parametrize("kind", ["token", "llm_int8"])
def test_a_processor_without_vnni_has_no_int8_product(
    kind: str, dtype: torch.dtype, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    kernel = choose(uneven(48, 64, INT8_ROWS), quantizer(kind), dtype, CPU)
    assert (kernel.name if kernel else None) == name


@vnni
def test_zeros_stay_zeros() -> None:
    weight = uneven(16, 32, INT8_ROWS)
    for kind in ("token", "llm_int8"):
        kernel = choose(weight, quantizer(kind), torch.float32, CPU)
        assert kernel is not None
        assert not kernel(torch.zeros(1, 3, 32), None).any()


def test_columns_in_another_order() -> None:
    base, order = uneven(32, 64, IntWeight(bits=4, granularity="group", group_size=32)), torch.randperm(64)
    weight = PermutedQTensor(base, order)
    kernel = choose(weight, None, torch.bfloat16, CPU)
    assert kernel is not None
    assert kernel.name == "cpu_w4a16"
    inputs = torch.randn(3, 64).bfloat16()
    assert error(kernel(inputs, None), inputs.double() @ weight.dequantize(torch.float64).t()) < 0.006


@pytest.mark.parametrize(
    ("fmt", "dtype", "name"),
    [
        (
            IntWeight(bits=4, granularity="group", group_size=32),
            torch.float32,
            None,
        ),  # vectorised only for bfloat16
        (IntWeight(bits=3, granularity="group", group_size=32), torch.bfloat16, None),
        (IntWeight(bits=4, granularity="group", group_size=16), torch.bfloat16, None),
        (IntWeight(bits=8, granularity="group", group_size=32), torch.bfloat16, None),
        (IntWeight(bits=8), torch.float32, None),
        (IntWeight(bits=8), torch.bfloat16, "cpu_w8a16"),
        (IntWeight(bits=4), torch.bfloat16, "cpu_w4a16"),
    ],
)
def test_the_table_leaves_to_the_reference_what_it_has_no_kernel_for(
    fmt: IntWeight, dtype: torch.dtype, name: str | None
) -> None:
    kernel = choose(uneven(32, 64, fmt), None, dtype, CPU)
    assert (kernel.name if kernel else None) == name


def test_shapes_that_torch_refuses_or_reads_past_the_end_of_are_decoded() -> None:
    assert choose(uneven(24, 64, IntWeight(bits=4)), None, torch.bfloat16, CPU) is None
    assert choose(uneven(32, 100, IntWeight(bits=8)), None, torch.bfloat16, CPU) is None


@vnni
def test_inputs_that_the_kernel_cannot_quantize_are_quantized_before_it() -> None:
    weight = uneven(48, 64, INT8_ROWS)
    rounding = InputQuantizer(IntActivation(bits=8))  # asymmetric
    linear = QuantLinear(weight, None, torch.bfloat16, rounding).pack()
    assert linear.kernel == "cpu_w8a16"
    inputs = torch.rand(3, 64).bfloat16()
    assert error(linear(inputs), exact(weight, rounding(inputs))) < 0.01


def test_packed_keeps_what_the_kernel_reads_and_nothing_else() -> None:
    weight = uneven(64, 128, IntWeight(bits=4, granularity="group", group_size=64))
    linear = QuantLinear(weight, torch.zeros(64).bfloat16(), torch.bfloat16).pack()
    assert isinstance(linear.packed, Kernel)
    assert resident_bytes(linear) == 64 * 128 // 2 + 64 * 2 * 4 + 64 * 2


@pytest.mark.parametrize(
    ("fmt", "inputs", "name"),
    [
        (IntWeight(bits=4, granularity="group", group_size=32), None, "triton_w4a16"),
        (IntWeight(bits=8), None, "triton_w8a16"),
        (IntWeight(bits=3), None, None),
        (INT8_ROWS, "token", "triton_w8a8"),
        (INT8_ROWS, "llm_int8", "triton_llm_int8"),
    ],
)
def test_the_table_of_a_gpu(fmt: IntWeight, inputs: str | None, name: str | None) -> None:
    rounding = quantizer(inputs) if inputs else None
    kernel = choose(uneven(64, 128, fmt), rounding, torch.float16, torch.device("cuda"))
    assert (kernel.name if kernel else None) == name
    assert choose(uneven(64, 128, fmt), rounding, torch.float64, torch.device("cuda")) is None
