"""Compare the 4-bit codebooks with published levels and naive loops, and their codes with those of bitsandbytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness.config import build
from harness.core import Scheme, Stats
from harness.core.formats import LevelsQTensor
from harness.core.formats.codebook import NESTED_BLOCK, decode_blocks, dynamic_levels, encode_blocks, nearest
from harness.nn import QuantLinear
from methods.nf4 import FP4, NF4, Codebook
from tests.conftest import resolve

NF4_LEVELS = """-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.0910500 0
    .0795803 .1609302 .2461123 .3379152 .4407098 .5626170 .7229568 1"""  # QLoRA, appendix E
FP4_LEVELS = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]  # for sign bit 0
METHODS = [NF4, FP4]
# Blocks within rows, blocks that span rows, a short last block, fewer values than a block, an odd count, two parts.
SHAPES = [(40, 128), (12, 96), (5, 70), (3, 7), (9, 25), (600, 576)]

# bitsandbytes finds 8-bit codes with a table of 2^16 cells, so its midpoint between two levels is off by up to half a
# cell of 2 / 2^16, and the difference of the distances to both levels by twice that.
_TABLE = 2.0**-15


def scheme(*overrides: str) -> Scheme:
    return build(Scheme, resolve(*overrides)["scheme"], "scheme")


def weights(rows: int, columns: int) -> Tensor:
    """Weights; each block has a different range."""
    spread = torch.rand(rows * columns // 32 + 1).mul(3).exp().repeat_interleave(32)[: rows * columns]
    return torch.randn(rows, columns) * spread.view(rows, columns) * 0.02


def quantized(method: Codebook, weight: Tensor) -> LevelsQTensor:
    qtensor = method.quantize(weight, scheme("method=nf4"), Stats())
    assert isinstance(qtensor, LevelsQTensor)
    return qtensor


def test_levels_are_the_published_ones() -> None:
    torch.testing.assert_close(NF4.levels(), torch.tensor(list(map(float, NF4_LEVELS.split()))), rtol=0, atol=6e-8)
    expected = torch.tensor(FP4_LEVELS + [-level for level in FP4_LEVELS])
    torch.testing.assert_close(FP4.levels(), expected, rtol=1e-7, atol=0)


def test_the_dynamic_map_has_as_many_levels_a_decade_as_its_fraction_has_values() -> None:
    levels = dynamic_levels()
    assert torch.equal(levels, levels.unique())
    assert len(levels) == 256
    for decade in range(7):
        inside = (levels.abs() > 10.0 ** -(decade + 1)) & (levels.abs() < 10.0**-decade)
        assert int(inside.sum()) == 2 * 2 ** (6 - decade)
        assert torch.equal(levels[inside], -levels[inside].flip(0))
    assert float(levels[254]) == pytest.approx(1 - 0.9 / 128, rel=1e-6)
    assert float(levels[128]) == pytest.approx(0.55e-6, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:5])
@pytest.mark.parametrize("method", METHODS)
def test_codes_are_the_nearest_of_all_levels_and_decode_as_level_times_scale(
    method: type[Codebook], shape: tuple[int, int]
) -> None:
    weight = weights(*shape)
    qtensor = quantized(method(double_quant=False), weight)
    levels, values = method.levels().double(), weight.double().flatten().tolist()
    codes, decoded = qtensor.codes.flatten().tolist(), qtensor.dequantize().double().flatten().tolist()
    assert qtensor.codes.shape == shape
    assert len(qtensor.absmax) == math.ceil(weight.numel() / 64)
    for start in range(0, weight.numel(), 64):
        block = slice(start, start + 64)
        scale = max(map(abs, values[block]))
        for value, code, back in zip(values[block], codes[block], decoded[block], strict=True):
            assert back == pytest.approx(float(levels[code]) * scale, rel=1e-6)
            best = float((levels * scale - value).abs().min())
            assert abs(back - value) <= best + 1e-6 * scale


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_codes_scales_and_values_are_those_of_bitsandbytes(
    method: type[Codebook], shape: tuple[int, int], double_quant: bool
) -> None:
    from bitsandbytes import functional

    weight = weights(*shape)
    qtensor = quantized(method(double_quant=double_quant), weight)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type=method.label
    )
    assert torch.equal(qtensor.levels, state.code)
    pairs = packed.flatten()
    theirs = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[: weight.numel()].view(shape)
    _agree_but_for_ties(qtensor.codes, theirs, _shares(weight.flatten(), 64).view(shape), qtensor.levels)
    theirs_scales = state.absmax
    if double_quant:
        assert qtensor.nested_levels is not None
        assert qtensor.nested_absmax is not None
        assert qtensor.offset is not None
        assert torch.equal(qtensor.nested_levels, state.state2.code)
        exact = encode_blocks(weight.flatten(), qtensor.levels, 64)[1] - qtensor.offset
        # A single scale equals the mean, so its nested absmax is 0.
        nonzero = qtensor.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(exact)] > 0
        shares = _shares(exact, NESTED_BLOCK)[nonzero]
        _agree_but_for_ties(qtensor.absmax[nonzero], state.absmax[nonzero], shares, qtensor.nested_levels, _TABLE)
        torch.testing.assert_close(qtensor.offset, state.offset, rtol=1e-6, atol=0)
        torch.testing.assert_close(qtensor.nested_absmax, state.state2.absmax, rtol=1e-6, atol=0)
        theirs_scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        same = qtensor.absmax == state.absmax
        torch.testing.assert_close(qtensor.scales()[same], theirs_scales[same], rtol=1e-6, atol=1e-8)
    else:
        assert torch.equal(qtensor.absmax, state.absmax)
    decoded = qtensor.levels[theirs.int()].flatten() * qtensor.scales().repeat_interleave(64)[: weight.numel()]
    if shape[1] % 64 == 0:  # bitsandbytes decodes blocks that span rows wrongly on some CPUs
        decoded = functional.dequantize_4bit(packed, state).flatten()
    same = (qtensor.codes == theirs).flatten() & _of_blocks(_close(qtensor.scales(), theirs_scales), weight.numel())
    torch.testing.assert_close(qtensor.dequantize().flatten()[same], decoded[same], rtol=2e-6, atol=1e-9)
    assert same.float().mean() > 0.99


def _shares(values: Tensor, block_size: int) -> Tensor:
    """Values divided by the largest magnitude of their block, in float64."""
    parts = [block / block.abs().max().clamp(min=1e-38) for block in values.double().split(block_size)]
    return torch.cat(parts)


def _agree_but_for_ties(ours: Tensor, theirs: Tensor, shares: Tensor, levels: Tensor, slack: float = 1e-6) -> None:
    """Few codes differ, and where they do, both levels are equally near to the value, within `slack`."""
    decoded = levels[ours.int()].double(), levels[theirs.int()].double()
    differ = ours != theirs
    assert int(differ.sum()) <= 1 + differ.numel() // 200
    first, second = ((level - shares).abs()[differ] for level in decoded)
    assert bool(((first - second).abs() <= slack).all())


def _close(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs() <= 1e-6 * second.abs() + 1e-9


def _of_blocks(flags: Tensor, count: int) -> Tensor:
    return flags.repeat_interleave(64)[:count]


@pytest.mark.parametrize("size", [1, 5, 64, 96])
def test_blocks_of_any_size(size: int) -> None:
    weight = weights(10, 33)
    qtensor = quantized(NF4(block_size=size, double_quant=False), weight)
    largest = [block.abs().max() for block in weight.flatten().split(size)]
    assert torch.equal(qtensor.absmax, torch.stack(largest))
    tops = torch.stack([block.abs().max() for block in qtensor.dequantize().flatten().split(size)])
    torch.testing.assert_close(tops, qtensor.absmax)
    if size == 1:
        torch.testing.assert_close(qtensor.dequantize(), weight)


def test_nearest_takes_levels_in_any_order_and_the_lower_of_two() -> None:
    levels = torch.tensor([3.0, -1.0, 1.0])
    assert nearest(torch.tensor([[-9.0, 0.0], [2.0, 2.1]]), levels).tolist() == [[1, 1], [2, 0]]


def test_a_block_of_blocks_is_decoded_in_its_own_scale() -> None:
    values = torch.tensor([1.0, -1.0, 0.5, 2.0, 1.0])
    assert decode_blocks(values.clone(), torch.tensor([1.0, 10.0, 100.0]), 2).tolist() == [1, -1, 5, 20, 100]


def test_double_quantization_costs_little() -> None:
    weight = weights(300, 320)
    single, double = (quantized(NF4(double_quant=on), weight) for on in (False, True))
    assert torch.equal(single.codes, double.codes)
    assert (double.scales() - single.scales()).norm() <= 0.01 * single.scales().norm()
    errors = [float((qtensor.dequantize() - weight).norm() / weight.norm()) for qtensor in (single, double)]
    assert 0.05 < errors[0] <= errors[1] * 1.001
    assert errors[1] < errors[0] * 1.01


def test_nf4_suits_a_normal_weight_better_than_fp4() -> None:
    weight = torch.randn(64, 256)
    nf4, fp4 = (float((quantized(method(), weight).dequantize() - weight).norm()) for method in METHODS)
    assert nf4 < 0.9 * fp4


def test_bits_are_counted_from_what_is_stored() -> None:
    rows, columns = 1024, 2048
    weight = torch.randn(rows, columns)
    books = (16 + 256 + 1) * 32  # both codebooks and the offset
    assert quantized(NF4(), weight).stored_bits == rows * columns * (4 + 8 / 64 + 32 / (64 * 256)) + books
    assert quantized(NF4(), weight).bits_per_weight == pytest.approx(4.127, abs=5e-3)
    assert quantized(FP4(double_quant=False), weight).stored_bits == rows * columns * (4 + 32 / 64) + 16 * 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_and_inputs_of_any_float_type(dtype: torch.dtype) -> None:
    weight, inputs = weights(24, 65).to(dtype), torch.randn(2, 3, 65).to(dtype)
    qtensor = quantized(NF4(), weight)
    assert torch.equal(qtensor.codes, quantized(NF4(), weight.float()).codes)
    assert torch.equal(qtensor.dequantize(dtype), qtensor.dequantize().to(dtype))
    packed = QuantLinear(qtensor, None, dtype).pack()
    assert packed.kernel == "codebook"
    torch.testing.assert_close(packed(inputs), inputs @ qtensor.dequantize(dtype).T, rtol=2e-2, atol=2e-2)


def test_what_is_refused() -> None:
    for options, message in (
        (("method=nf4", "scheme=group64"), "scheme=group64 is another format than .* nf4; use scheme=native"),
        (("method=fp4", "bits=3"), "bits=3 does not match nf4, which has 4 bits; use bits=4"),
    ):
        with pytest.raises(ValueError, match=message):
            NF4().check(scheme(*options))
    with pytest.raises(ValueError, match="block_size=0 is out of range; expected 1 or more"):
        FP4(block_size=0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantized(NF4(), torch.full((2, 3), 1e300, dtype=torch.float64))
