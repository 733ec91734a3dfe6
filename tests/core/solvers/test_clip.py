"""Clipped ranges: never worse than the minimum-maximum grid, and their objective is the output error on the samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.core import Hessian, IntWeight
from harness.core.solvers.clip import clipped_ends, clipped_params, group_errors
from tests.support.reference import FORMATS as EXACT
from tests.support.reference import naive_clip, naive_group_errors

FORMATS = {
    **EXACT,
    "narrow": IntWeight(bits=3, symmetric=True, grid="narrow", scale_dtype="float32"),
    "float16": IntWeight(bits=4, granularity="group", group_size=8),
}
SHARES = [1 - i / 20 for i in range(11)]  # down to half


def weights(seed: int = 0, rows: int = 6, columns: int = 32) -> Tensor:
    """Float64 weights with heavy tails; every group has a different range, every row a different offset."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 3 + torch.randn(rows, 1, generator=generator)
    spread = torch.rand(rows, columns // 8, generator=generator).mul(4).exp().repeat_interleave(8, 1)
    return (weight * spread * 0.02).double()


def inputs(seed: int = 0, columns: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator).mul(3).exp()
    return (torch.randn(40, columns, generator=generator) @ mix).double()


def hessian_of(samples: Tensor) -> Tensor:
    stat = Hessian(samples.shape[1])
    stat.update(samples, samples)
    return stat.value


@pytest.mark.parametrize("name", FORMATS)
def test_group_errors_are_those_of_the_samples(name: str) -> None:
    weight, samples, fmt = weights(), inputs(), FORMATS[name]
    params = fmt.weight_params(weight)
    decoded = fmt.quantized(weight, params).dequantize(torch.float64)
    errors = group_errors(weight, params, fmt, hessian_of(samples))
    expected = naive_group_errors(weight, decoded, samples, fmt)
    assert errors.shape == fmt.groups((6, 32)) == expected.shape
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=0)


@given(seed=st.integers(0, 2**20), name=st.sampled_from(sorted(FORMATS)))
@settings(max_examples=40)
def test_never_worse_than_minimum_and_maximum(seed: int, name: str) -> None:
    weight, hessian, fmt = weights(seed), hessian_of(inputs(seed)), FORMATS[name]
    plain = group_errors(weight, fmt.weight_params(weight), fmt, hessian)
    clipped = group_errors(weight, clipped_params(weight, fmt, hessian), fmt, hessian)
    assert (clipped <= plain).all()


@pytest.mark.parametrize("name", FORMATS)
def test_tails_are_worth_clipping(name: str) -> None:
    weight, hessian, fmt = weights(), hessian_of(inputs()), FORMATS[name]
    plain = group_errors(weight, fmt.weight_params(weight), fmt, hessian).sum()
    clipped = group_errors(weight, clipped_params(weight, fmt, hessian), fmt, hessian).sum()
    assert clipped < 0.99 * plain


@pytest.mark.parametrize("name", ["narrow", "channel", "float_zero"])
def test_each_group_has_the_best_of_the_shares_that_were_tried(name: str) -> None:
    weight, hessian, fmt = weights(), hessian_of(inputs()), FORMATS[name]
    errors = group_errors(weight, clipped_params(weight, fmt, hessian), fmt, hessian)
    size = 32 // errors.shape[1]
    for g in range(errors.shape[1]):
        cells = slice(g * size, (g + 1) * size)
        for i in range(len(weight)):
            one = IntWeight(
                bits=fmt.bits, symmetric=fmt.symmetric, grid=fmt.grid, zero_point=fmt.zero_point, scale_dtype="float32"
            )
            best = naive_clip(weight[i : i + 1, cells], hessian[cells, cells], one, SHARES)
            if fmt.symmetric:
                assert float(errors[i, g]) == pytest.approx(best, rel=1e-6)
            else:  # each end is then also moved alone
                assert float(errors[i, g]) <= best * (1 + 1e-6)


def test_each_end_of_an_asymmetric_range_moves_alone() -> None:
    weight = torch.tensor([[-1.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 6.0]]).double()
    fmt = IntWeight(bits=2, scale_dtype="float32")
    hessian = torch.eye(8, dtype=torch.float64)
    hessian[7, 7] = 1e-3  # the output hardly depends on the tail
    error = float(group_errors(weight, clipped_params(weight, fmt, hessian), fmt, hessian))
    assert error < naive_clip(weight, hessian, fmt, SHARES)


@pytest.mark.parametrize("name", FORMATS)
def test_the_ends_are_those_of_the_chosen_ranges(name: str) -> None:
    weight, hessian, fmt = weights(), hessian_of(inputs()), FORMATS[name]
    low, high = clipped_ends(weight, fmt, hessian)
    chosen = clipped_params(weight, fmt, hessian)
    covering = fmt.cover(low, high, fmt.whole(weight))
    assert torch.equal(covering.scale, chosen.scale)
    if chosen.zero_point is not None:
        assert covering.zero_point is not None
        assert torch.equal(covering.zero_point, chosen.zero_point)


def test_the_scale_is_exact_in_its_dtype() -> None:
    params = clipped_params(weights(), FORMATS["float16"], hessian_of(inputs()))
    zero_point = params.zero_point
    assert torch.equal(params.scale.half().double(), params.scale)
    assert torch.equal(zero_point.round().clamp(0, 15), zero_point)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = weights()
    weight[1, 3] = torch.inf
    with pytest.raises(ValueError, match="the weight holds NaN or infinite values"):
        clipped_params(weight, FORMATS["group"], hessian_of(inputs()))
