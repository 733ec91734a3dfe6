"""The int8 kernels in Triton's interpreter: codes against those of InputQuantizer, results against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import IntActivation, IntQTensor, IntWeight, round_to_nearest
from harness.core.formats import InputQuantizer
from harness.kernels.triton import int8_matmul
from harness.kernels.triton.int8_rows import quantize_rows
from harness.kernels.triton.w8a8 import TritonW8A8, supports

ROWS = IntWeight(bits=8, symmetric=True, grid="narrow", scale_dtype="float32")
TOKENS = IntActivation(bits=8, symmetric=True, grid="narrow")
FULL = IntActivation(bits=8, symmetric=True)
SEQUENCES = IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor")
STATIC = IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor", dynamic=False)
OUTLIERS = IntActivation(bits=8, symmetric=True, grid="narrow", threshold=6.0)
EPS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs (..., K) whose tokens differ in magnitude by a factor of up to 400."""
    sizes = torch.linspace(-3, 3, torch.Size(shape[:-1]).numel()).exp().view(*shape[:-1], 1)
    return (torch.randn(shape) * sizes).to(dtype)


def weights(rows: int, columns: int, fmt: IntWeight = ROWS) -> IntQTensor:
    """A weight (N, K) with a different scale in each row."""
    return round_to_nearest(torch.randn(rows, columns) * torch.linspace(-2, 2, rows).exp()[:, None], fmt)


def quantizer(fmt: IntActivation) -> InputQuantizer:
    return InputQuantizer(fmt, None if fmt.dynamic else (torch.tensor(-4.0), torch.tensor(5.0)))


def exact(weight: IntQTensor, rounding: InputQuantizer, x: Tensor, bias: Tensor | None) -> Tensor:
    """x' W'^T + b in float64, where x' is x quantized by `rounding`."""
    y = rounding(x.float()).double() @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def assert_close(outputs: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare each row and each column relative to its norm, because magnitudes differ between tokens and outputs."""
    assert outputs.dtype == dtype
    error = (outputs.double() - expected).flatten(0, -2)
    expected = expected.flatten(0, -2)
    for axis in (0, 1):
        assert bool((error.norm(dim=axis) <= EPS[dtype] * expected.norm(dim=axis)).all())


def kernel_codes(x: Tensor, rounding: InputQuantizer) -> tuple[Tensor, Tensor]:
    return quantize_rows(x, rounding.integers.steps, None, None)


@pytest.mark.parametrize("fmt", [TOKENS, FULL], ids=["narrow", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 96), (3, 130), (17, 576)])
def test_codes_are_the_input_quantizer_s(fmt: IntActivation, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = inputs(*shape, dtype=dtype)
    x[-1, 5:] = 0
    rounding = quantizer(fmt)
    codes, scale = kernel_codes(x, rounding)
    expected, expected_scale = rounding.encode(x)
    assert torch.equal(scale, expected_scale[:, 0])
    steps = x.double() / expected_scale.double()
    tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert torch.equal(codes.int()[~tie], expected.int()[~tie])
    assert bool(((codes.int() - expected.int()).abs()[tie] <= 1).all())
    assert bool(tie.float().mean() < 0.05)  # on the full grid, the largest value of a row always is a tie


def test_values_outside_a_given_scale_are_clipped() -> None:
    codes, scale = quantize_rows(torch.tensor([[0.0, 0.5, 1.5, -1.5, 900.0, -900.0]]), 127.0, torch.ones(1), None)
    assert codes.tolist() == [[0, 0, 2, -2, 127, -128]]  # half to even
    assert scale.tolist() == [1.0]


def test_a_row_with_nan_says_so_and_leaves_the_others_alone() -> None:
    x = inputs(3, 96)
    x[1, 7] = torch.nan
    outputs = TritonW8A8(weights(100, 96), quantizer(TOKENS), torch.float32)(x, None)
    assert bool(outputs[1].isnan().all())
    assert bool(outputs[[0, 2]].isfinite().all())


def test_values_too_small_for_a_finite_inverse_still_decode_to_themselves() -> None:
    x = torch.tensor([[1e-36, -1e-37, 0.0, 3e-38], [1e-37, -1e-38, 0.0, 2e-44]])
    codes, scale = quantize_rows(x, 127.0, None, None)
    assert bool(((codes.double() * scale[:, None].double() - x.double()).abs() <= scale[:, None] * 0.5001).all())
    assert scale.max() < 1.2e-38


SHAPES = [(1, 100, 96), (3, 192, 130), (17, 100, 576), (65, 192, 576), (1, 192, 1600), (100, 1100, 96), (260, 300, 130)]


@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
def test_the_integer_result_is_exact(rows: int, columns: int, inner: int) -> None:
    """With unit scales and float32 outputs nothing is rounded, because the sums stay below 2^24."""
    codes = torch.randint(-128, 128, (rows, inner), dtype=torch.int8)
    weight = torch.randint(-128, 128, (columns, inner), dtype=torch.int8)
    outputs = int8_matmul.int8_matmul(codes, torch.ones(rows), weight, torch.ones(columns), None, torch.float32)
    assert torch.equal(outputs.long(), codes.long() @ weight.long().T)


def test_sums_beyond_float32_are_split_and_tiled_alike() -> None:
    """The largest sums that codes can reach: every path sums the parts as integers."""
    codes, weight = torch.full((2, 1600), -128, dtype=torch.int8), torch.full((100, 1600), -128, dtype=torch.int8)
    weight[:, ::3] = 127
    outputs = int8_matmul.int8_matmul(codes, torch.ones(2), weight, torch.ones(1), None, torch.float32)
    assert torch.equal(outputs, (codes.long() @ weight.long().T).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES[:4])
def test_linear_against_float64(rows: int, columns: int, inner: int, dtype: torch.dtype) -> None:
    weight, rounding, x = weights(columns, inner), quantizer(TOKENS), inputs(rows, inner, dtype=dtype)
    bias = torch.randn(columns).to(dtype)
    outputs = TritonW8A8(weight, rounding, dtype)(x, bias)
    assert outputs.shape == (rows, columns)
    assert_close(outputs, exact(weight, rounding, x, bias), dtype)


@pytest.mark.parametrize("fmt", [TOKENS, SEQUENCES, STATIC], ids=["tokens", "sequences", "static"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_formats(fmt: IntActivation, granularity: Any) -> None:
    weight = weights(100, 130, replace(ROWS, granularity=granularity, grid="full", scale_dtype="float16"))
    rounding, x = quantizer(fmt), inputs(3, 5, 130)
    x[0, 1] = 0
    outputs = TritonW8A8(weight, rounding, torch.float32)(x, None)
    assert_close(outputs, exact(weight, rounding, x, None), torch.float32)


def spiky(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Three sequences (B, T, K) of small values, with different outlier channels in the first two and none in the last.

    The smallest outlier is exactly at the threshold.
    """
    x = torch.randn(3, 5, 200).clamp(-3, 3) * torch.linspace(0.2, 1.5, 5)[:, None]
    for sequence in (0, 1):
        channels = torch.randperm(200)[:count]
        x[sequence, sequence, channels] = 6.0 + 8 * torch.arange(count)
    return x.to(dtype)


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("count", [0, 1, 7, 150])
def test_outliers_against_float64(count: int, granularity: Any) -> None:
    weight, rounding, x = weights(100, 200), quantizer(replace(OUTLIERS, granularity=granularity)), spiky(count)
    outputs = TritonW8A8(weight, rounding, torch.float32)(x, torch.ones(100))
    assert_close(outputs, exact(weight, rounding, x, torch.ones(100)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outliers_in_16_bits(dtype: torch.dtype) -> None:
    weight, rounding, x = weights(100, 200), quantizer(OUTLIERS), spiky(7, dtype)
    outputs = TritonW8A8(weight, rounding, dtype)(x, None)
    assert_close(outputs, exact(weight, rounding, x, None), dtype)


def test_outliers_over_split_k() -> None:
    """K has 13 blocks and is split into three parts; outliers are in the first, the middle and the last part."""
    weight, rounding, x = weights(100, 1600), quantizer(OUTLIERS), torch.randn(2, 1600).clamp(-3, 3)
    assert int8_matmul._config(2, 100, 1600, *int8_matmul._H100).split_k == 3
    x[0, [3, 700, 1599]] = 50.0
    outputs = TritonW8A8(weight, rounding, torch.float32)(x, None)
    assert_close(outputs, exact(weight, rounding, x, None), torch.float32)


def test_a_batch_is_its_sequences() -> None:
    kernel, x = TritonW8A8(weights(100, 200), quantizer(OUTLIERS), torch.float32), spiky(7)
    assert torch.equal(kernel(x, None), torch.cat([kernel(x[i : i + 1], None) for i in range(3)]))


def test_ranks_and_strides() -> None:
    kernel, x = TritonW8A8(weights(100, 200), quantizer(OUTLIERS), torch.float32), spiky(7)
    expected = kernel(x, None)
    assert torch.equal(kernel(x.mT.contiguous().mT, None), expected)
    assert torch.equal(kernel(x[None], None)[0], expected)
    assert torch.equal(kernel(x[0], None), expected[0])
    assert torch.equal(kernel(x[2, 0], None), expected[2, 0])
    assert kernel(x[:0], None).shape == (0, 5, 100)


def test_two_runs_give_the_same_bits() -> None:
    kernel, x = TritonW8A8(weights(100, 1600), quantizer(OUTLIERS), torch.bfloat16), inputs(3, 1600).bfloat16()
    assert torch.equal(kernel(x, None), kernel(x, None))


@pytest.mark.parametrize("gpu", [(132, 90), (108, 80)])
@pytest.mark.parametrize("rows", [1, 16, 64, 200, 4096])
def test_launches_fill_the_gpu_and_leave_each_program_work(rows: int, gpu: tuple[int, int]) -> None:
    config = int8_matmul._config(rows, 4096, 4096, *gpu)
    programs = -(-4096 // config.block_n) * -(-rows // config.block_m) * config.split_k
    assert programs >= 0.5 * gpu[0]
    assert config.split_k <= 4096 // int8_matmul.BLOCK_K // 4
    assert (config.split_k > 1) == (rows <= 64 or (rows, gpu[0]) == (200, 132))


def test_custom_ops_keep_torch_s_rules() -> None:
    x, marks = inputs(2, 96), torch.zeros(1, 96, dtype=torch.bool)
    torch.library.opcheck(quantize_rows, (x, 127.0, None, marks))
    torch.library.opcheck(quantize_rows, (x, 127.0, torch.ones(1), None))
    codes, scale = quantize_rows(x, 127.0, None, None)
    weight = torch.randint(-128, 128, (100, 96), dtype=torch.int8)
    for optional in ((None, torch.float16), (torch.ones(100), torch.float32, x, marks)):
        torch.library.opcheck(int8_matmul.int8_matmul, (codes, scale, weight, torch.ones(100), *optional))


def test_one_graph_under_torch_compile() -> None:
    kernel, x = TritonW8A8(weights(100, 200), quantizer(OUTLIERS), torch.float32), spiky(7)
    compiled = torch.compile(kernel, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, None), kernel(x, None))


def test_what_is_kept_is_what_was_stored() -> None:
    for fmt in (ROWS, replace(ROWS, granularity="tensor", scale_dtype="float16")):
        weight = weights(100, 96, fmt)
        kernel = TritonW8A8(weight, quantizer(TOKENS), torch.bfloat16)
        assert 8 * sum(buffer.nbytes for buffer in kernel.buffers()) == weight.stored_bits
        assert torch.equal(kernel.weight.float() * kernel.scale.float(), weight.dequantize())
    assert kernel.name == "triton_w8a8"
    assert TritonW8A8(weight, quantizer(OUTLIERS), torch.bfloat16).name == "triton_llm_int8"


def test_other_formats_are_refused() -> None:
    supported, rounding = weights(8, 32), quantizer(TOKENS)
    assert supports(supported, rounding, torch.bfloat16)
    grouped = replace(ROWS, granularity="group", group_size=16)
    for fmt in (replace(ROWS, bits=4), replace(ROWS, symmetric=False, grid="full"), grouped):
        assert not supports(weights(8, 32, fmt), rounding, torch.bfloat16)
    assert not supports(supported, quantizer(replace(TOKENS, bits=4)), torch.bfloat16)
    assert not supports(supported, quantizer(replace(TOKENS, symmetric=False, grid="full")), torch.bfloat16)
    assert not supports(supported, quantizer(replace(TOKENS, clip=0.9)), torch.bfloat16)
    assert not supports(supported, rounding, torch.float64)
    with pytest.raises(ValueError, match=r"kernel=triton_w8a8 does not support .*bits=4.*expected symmetric 8-bit"):
        TritonW8A8(weights(8, 32, replace(ROWS, bits=4)), rounding, torch.bfloat16)
