"""The grid against hand-computed cases and a naive float64 version of its formulas, and its properties."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.core import IntActivation, IntQTensor, IntWeight, round_to_nearest
from harness.core.formats import InputQuantizer, Params
from tests.support.reference import naive_rtn

KINDS: list[dict[str, Any]] = [
    {"symmetric": False, "zero_point": "integer"},
    {"symmetric": False, "zero_point": "float"},
    {"symmetric": True, "grid": "full"},
    {"symmetric": True, "grid": "narrow"},
]
SHARES: list[dict[str, Any]] = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 8},
    {"granularity": "group", "group_size": -1},
]
formats = st.builds(
    lambda bits, kind, share, dtype: IntWeight(bits=bits, **kind, **share, scale_dtype=dtype),
    st.integers(2, 8),
    st.sampled_from(KINDS),
    st.sampled_from(SHARES),
    st.sampled_from(["float16", "float32", "bfloat16"]),
)


def uneven(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with a different range in every group and a different offset in every row, to reveal a wrong index."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    spread = torch.rand(rows, columns // 8, generator=generator).mul(4).exp().repeat_interleave(8, 1)
    return (weight + torch.randn(rows, 1, generator=generator)) * spread * 0.02


def test_asymmetric_by_hand() -> None:
    fmt = IntWeight(bits=2, scale_dtype="float32")
    quantized = round_to_nearest(torch.tensor([[-1.0, 0.0, 0.4, 2.0]]), fmt)
    assert quantized.scale.item() == 1.0  # (2 - -1) / 3
    assert quantized.zero_points().item() == 1.0
    assert quantized.codes.tolist() == [[0, 1, 1, 3]]
    assert quantized.dequantize().tolist() == [[-1.0, 0.0, 0.0, 2.0]]


def test_asymmetric_range_is_widened_to_hold_zero() -> None:
    quantized = round_to_nearest(torch.tensor([[2.0, 3.0]]), IntWeight(bits=2, scale_dtype="float32"))
    assert quantized.scale.item() == 1.0
    assert quantized.zero_points().item() == 0.0
    assert quantized.codes.tolist() == [[2, 3]]


def test_float_zero_point_spends_no_code_on_zero() -> None:
    fmt = IntWeight(bits=2, zero_point="float", scale_dtype="float32")
    quantized = round_to_nearest(torch.tensor([[2.0, 2.25, 3.5]]), fmt)
    assert quantized.scale.item() == 0.5
    assert quantized.zero_points().item() == -4.0
    assert quantized.codes.tolist() == [[0, 0, 3]]  # 0.5 rounds to even


def test_the_two_symmetric_grids_differ() -> None:
    weight = torch.tensor([[-3.0, 3.0, 1.0]])
    full = round_to_nearest(weight, IntWeight(bits=3, symmetric=True, grid="full", scale_dtype="float32"))
    narrow = round_to_nearest(weight, IntWeight(bits=3, symmetric=True, grid="narrow", scale_dtype="float32"))
    assert full.scale.item() == pytest.approx(6 / 7)
    assert full.codes.tolist() == [[0, 7, 5]]  # 3 / (6/7) = 3.5 rounds to even 4, and is clipped to 3
    assert narrow.scale.item() == 1.0
    assert narrow.codes.tolist() == [[1, 7, 5]]
    assert full.zero_point is None
    assert narrow.zero_point is None


@pytest.mark.parametrize(("bits", "kind", "share"), list(itertools.product((2, 3, 4, 8), KINDS, SHARES)))
def test_equals_naive_float64(bits: int, kind: dict[str, Any], share: dict[str, Any]) -> None:
    fmt = IntWeight(bits=bits, **kind, **share, scale_dtype="float32")
    weight = uneven(6, 32).double()
    quantized = round_to_nearest(weight, fmt)
    codes, decoded = naive_rtn(weight, fmt)
    assert quantized.codes.tolist() == codes
    assert (quantized.dequantize(torch.float64) - decoded).norm() / decoded.norm() < 1e-6


@given(fmt=formats, seed=st.integers(0, 2**16), exponent=st.integers(-30, 12))
def test_error_is_at_most_one_scale(fmt: IntWeight, seed: int, exponent: int) -> None:
    weight = uneven(5, 16, seed) * 2.0**exponent
    if fmt.scale_dtype == "float16":  # scales below its range are refused, or a warning
        weight = weight * 2.0 ** max(0, -8 - exponent)
    quantized = round_to_nearest(weight, fmt)
    scale = quantized.scale.float()
    error = fmt.to_groups((quantized.dequantize() - weight).abs())
    slack = 1.0 if fmt.scale_dtype != "bfloat16" else 1.5  # a scale error of 2^-9 over 2^8 - 1 steps adds half a step
    if fmt.zero_point == "float" and not fmt.symmetric and fmt.scale_dtype != "float32":
        slack += float((quantized.zero_points().abs().max() + fmt.max_code) * 2**-8)
    assert (error <= slack * scale[..., None] * 1.001).all()


@given(fmt=formats, seed=st.integers(0, 2**16))
def test_scaling_the_weight_scales_scale_and_leaves_codes(fmt: IntWeight, seed: int) -> None:
    weight = uneven(4, 16, seed) + 0.5  # keeps scales above the subnormal range of float16
    plain, larger = round_to_nearest(weight, fmt), round_to_nearest(weight * 4, fmt)
    assert torch.equal(plain.codes, larger.codes)
    assert torch.equal(plain.scale.float() * 4, larger.scale.float())


@given(fmt=formats, seed=st.integers(0, 2**16))
def test_permuting_rows_permutes_everything(fmt: IntWeight, seed: int) -> None:
    weight = uneven(6, 16, seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain, permuted = round_to_nearest(weight, fmt), round_to_nearest(weight[order], fmt)
    assert torch.equal(plain.dequantize()[order], permuted.dequantize())


@given(fmt=formats, seed=st.integers(0, 2**16))
def test_decoded_values_are_fixed_points(fmt: IntWeight, seed: int) -> None:
    quantized = round_to_nearest(uneven(4, 16, seed), fmt)
    codes = fmt.encode(fmt.to_groups(quantized.dequantize()), quantized.params().spread())
    assert torch.equal(codes.view(quantized.shape), quantized.codes)


def test_snap_is_decode_of_encode() -> None:
    fmt = IntActivation(bits=4)
    values = torch.randn(7, 9)
    params = fmt.params(values).spread()
    assert torch.equal(fmt.snap(values, params), fmt.decode(fmt.encode(values, params), params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-7, -1e-7, 3.0, -5e-5, 1e-30])
def test_constant_groups_stay_finite_and_close(kind: dict[str, Any], value: float) -> None:
    fmt = IntWeight(bits=4, **kind, scale_dtype="float32")
    quantized = round_to_nearest(torch.full((2, 8), value), fmt)
    assert torch.isfinite(quantized.dequantize()).all()
    assert (quantized.dequantize() - value).abs().max() <= quantized.scale.float().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(bad: float) -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        round_to_nearest(weight, IntWeight(bits=4))


def test_float_zero_point_beyond_float16_is_refused_with_the_remedy() -> None:
    fmt = IntWeight(bits=4, zero_point="float")
    with pytest.raises(ValueError, match="cannot hold the zero point of a group far from 0; use .*float32"):
        round_to_nearest(1 + 1e-6 * torch.randn(2, 8), fmt)


def test_scale_beyond_float16_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="scale_dtype=float32"):
        round_to_nearest(torch.full((1, 8), 1e7), IntWeight(bits=4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("factor", [2.0**-23, 2.0**-27, 2.0**-66])
def test_scales_below_float16_are_refused_with_a_remedy_that_works(
    kind: dict[str, Any], share: dict[str, Any], factor: float
) -> None:
    weight, fmt = uneven(6, 32), IntWeight(bits=4, **kind, **share)
    with pytest.raises(ValueError, match=r"scale_dtype=float16 cannot hold the scales, .* smaller; use .*=float32$"):
        round_to_nearest(weight * factor, fmt)
    exact = dataclasses.replace(fmt, scale_dtype="float32")
    expected = round_to_nearest(weight, exact).dequantize()
    assert torch.equal(round_to_nearest(weight * factor, exact).dequantize(), expected * factor)


def test_scales_that_bfloat16_and_float32_cannot_hold_are_refused() -> None:
    weight = torch.tensor([[1e-40, -1e-40, 3e-41, 0.0]])
    with pytest.raises(ValueError, match="scale_dtype=bfloat16 cannot hold the scales, .*; use .*=float32"):
        round_to_nearest(weight, IntWeight(bits=8, scale_dtype="bfloat16"))


def test_the_limit_is_the_growth_of_the_error() -> None:
    """Subnormal scales are accepted where rounding them up costs less than 1 %, whatever their position."""
    fmt = IntWeight(bits=4, symmetric=True, grid="narrow")
    largest = 7 * 2.0**-24 * torch.tensor([[60.4], [80.7], [90.2]])  # scales in steps of the subnormal numbers
    weight = largest * torch.linspace(-1, 1, 8)
    assert float(round_to_nearest(weight, fmt).scale.max()) < torch.finfo(torch.float16).tiny
    with pytest.raises(ValueError, match="cannot hold"):
        round_to_nearest(weight / 2, fmt)


def test_dead_channels_of_a_normal_weight_are_a_warning_with_their_number() -> None:
    weight, fmt = uneven(6, 32), IntWeight(bits=4, granularity="group", group_size=8)
    expected = round_to_nearest(weight, fmt).dequantize()
    weight[2], weight[4, 8:16], weight[5] = weight[2] * 1e-7, weight[4, 8:16] * 1e-8, 0
    with pytest.warns(UserWarning, match=r"^5 of 20 groups have scales below the range of scheme.weight.scale_dtype"):
        decoded = round_to_nearest(weight, fmt).dequantize()
    normal = [0, 1, 3]
    assert torch.equal(decoded[normal], expected[normal])
    assert (decoded - weight).abs().max() <= (expected - uneven(6, 32)).abs().max()


def test_a_group_of_zeros_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    weight = uneven(6, 32)
    weight[:3] = 0
    round_to_nearest(weight, IntWeight(bits=4))
    assert not round_to_nearest(torch.zeros(4, 16), IntWeight(bits=4)).dequantize().any()
    assert not recwarn.list


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", SHARES)
def test_stored_bits_equal_the_analytic_figure(bits: int, kind: dict[str, Any], share: dict[str, Any]) -> None:
    fmt = IntWeight(bits=bits, **kind, **share)
    quantized = round_to_nearest(torch.randn(64, 128), fmt)
    padding = 7 / (64 * 128) if fmt.granularity == "tensor" else 0  # a single zero point does not fill its last byte
    assert quantized.bits_per_weight == pytest.approx(fmt.bits_per_weight((64, 128)), abs=padding + 1e-12)


def test_bits_per_weight_of_the_glossary() -> None:
    fmt = IntWeight(bits=4, granularity="group", group_size=128)
    assert fmt.bits_per_weight((256, 1024)) == 4 + 20 / 128


def test_qtensor_refuses_parts_that_it_cannot_store() -> None:
    fmt = IntWeight(bits=4, granularity="group", group_size=8)
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1\); expected \(2, 2\)"):
        IntQTensor(codes, Params(ones[:, :1], ones), fmt)
    with pytest.raises(ValueError, match="not exact in float16"):
        IntQTensor(codes, Params(ones * 1.0001, ones), fmt)
    with pytest.raises(ValueError, match="code 16 does not fit bits=4"):
        IntQTensor(codes + 16, Params(ones, ones), fmt)
    with pytest.raises(ValueError, match="expected integers of 0 or more"):
        IntQTensor(codes, Params(ones, ones * 3.7), fmt)
    with pytest.raises(ValueError, match="codes have dtype torch.float32"):
        IntQTensor(codes.float(), Params(ones, ones), fmt)
    with pytest.raises(ValueError, match="does not fit symmetric=False; expected a zero point"):
        IntQTensor(codes, Params(ones), fmt)
    symmetric = IntWeight(bits=4, symmetric=True, granularity="group", group_size=8)
    with pytest.raises(ValueError, match="does not fit symmetric=True; expected no zero point"):
        IntQTensor(codes, Params(ones, ones), symmetric)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [96, 90])
def test_inputs_in_groups_have_a_scale_for_each_of_them(columns: int, symmetric: bool) -> None:
    """The last group may have fewer channels; sequences of a batch never share anything."""
    fmt = IntActivation(bits=4, symmetric=symmetric, granularity="group", group_size=32)
    quantizer = InputQuantizer(fmt)
    inputs = torch.randn(2, 5, columns) * torch.rand(columns).mul(4).exp()
    found = quantizer(inputs)
    for start in range(0, columns, 32):
        part = inputs[..., start : start + 32]
        alone = IntActivation(bits=4, symmetric=symmetric)
        torch.testing.assert_close(found[..., start : start + 32], InputQuantizer(alone)(part))
    assert torch.equal(found[1], quantizer(inputs[1]))
    whole = InputQuantizer(IntActivation(bits=4, symmetric=symmetric))(inputs)
    assert (found - inputs).norm() < 0.8 * (whole - inputs).norm()


def test_no_kernel_takes_inputs_in_groups() -> None:
    fmt = IntActivation(bits=8, symmetric=True, grid="narrow", granularity="group", group_size=32)
    assert InputQuantizer(fmt).integers is None
