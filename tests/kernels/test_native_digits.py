"""Rows of inputs as sums of digits, where the processor has products of bytes: what digits could lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import IntWeight
from harness.kernels.native import grouped
from tests.support.kernels import BOUNDS, built, check, error, exact, uneven

pytestmark = built
GROUPS = IntWeight(bits=4, granularity="group", group_size=96)  # two chunks of inputs, of 64 and of 32
CHUNKS = IntWeight(bits=4, granularity="group", group_size=64)  # one chunk each


def outputs(inputs: Tensor, fmt: IntWeight = GROUPS) -> tuple[Tensor, Tensor]:
    """Of the kernel, and in float64."""
    weight = uneven(40, inputs.shape[1], fmt)
    return grouped.build(weight)(inputs, None), exact(weight, inputs)


@pytest.mark.parametrize("size", [80, 96, 160, 240])
def test_groups_of_several_chunks(level: str, size: int) -> None:
    weight = uneven(24, 480, IntWeight(bits=3, granularity="group", group_size=size))
    for dtype in BOUNDS:
        check(grouped.build(weight), weight, dtype, 3)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 127.0 / 128, 0.99608, 255.0 / 256, 1 - 2.0**-24, -1.0, 1e30, 1e-30])
def test_values_at_the_limits_of_a_digit(level: str, dtype: torch.dtype, value: float) -> None:
    for rows, fmt in ((2, GROUPS), (10, CHUNKS)):
        found, expected = outputs(torch.full((rows, 192), value).to(dtype), fmt)
        assert (found.double() - expected).norm() <= BOUNDS[dtype] * expected.norm()


def test_no_largest_value_of_a_chunk_exceeds_its_digits(level: str) -> None:
    """Steps of 2e-6 over the values among which the unit of a chunk changes; each is the largest one of a row."""
    for dtype in BOUNDS:
        inputs = torch.linspace(0.99, 1, 5000)[:, None].expand(-1, 64).to(dtype)
        for part in (inputs, *inputs[::10].split(1)):
            found, expected = outputs(part, CHUNKS)
            errors = (found.double() - expected).norm(dim=1) / expected.norm(dim=1)
            assert errors.max() <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
def test_chunks_of_any_magnitude_keep_their_digits(level: str, dtype: torch.dtype) -> None:
    """Each chunk has a unit of its own: a large one takes no digits from the others."""
    for rows in (1, 10):
        inputs = torch.randn(rows, 192) * torch.logspace(-12, 12, 3).repeat_interleave(64)
        for part in (inputs, inputs * torch.tensor(192 * [0.0]).index_fill(0, torch.arange(64), 1)):
            found, expected = outputs(part.to(dtype), CHUNKS)
            assert error(found, expected) < BOUNDS[dtype]


def test_values_far_below_the_largest_of_their_chunk(level: str) -> None:
    """They keep the digits above 2^-23 of the largest; here the largest meets a weight of zero."""
    weight = uneven(16, 64, IntWeight(bits=8, granularity="group", group_size=64))
    weight.codes[:, 0] = weight.zero_points().to(weight.codes.dtype)[:, 0]
    inputs = torch.randn(1, 64)
    inputs[0, 0] = 1000
    expected = exact(weight, inputs)
    bound = 2**-23 * 1000 * weight.dequantize(torch.float64).abs().sum(dim=1)
    assert ((grouped.build(weight)(inputs, None).double() - expected).abs() < bound).all()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_inputs_that_are_not_finite_reach_the_outputs(level: str, dtype: torch.dtype, value: float) -> None:
    for rows, fmt in ((3, GROUPS), (12, CHUNKS)):
        inputs = torch.ones(rows, 192, dtype=dtype)
        inputs[1, 100] = value
        found, _ = outputs(inputs, fmt)
        assert not found[1].isfinite().any()
        assert found[torch.arange(rows) != 1].isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "group", "group_size": 64},
        {"granularity": "group", "group_size": 192, "symmetric": True},
        {"granularity": "group", "group_size": 64, "zero_point": "float", "scale_dtype": "float32"},
        {"granularity": "channel"},
    ],
)
def test_many_rows(level: str, bits: int, options: dict[str, Any]) -> None:
    """Stacks of rows of any height, several tiles of inputs, and an odd number of panels."""
    weight = uneven(40, 576, IntWeight(bits=bits, **options))
    kernel = grouped.build(weight)
    for dtype in BOUNDS:
        for tokens in (9, 13, 31):
            check(kernel, weight, dtype, tokens)


@pytest.mark.parametrize("columns", [16, 80, 500, 528])
def test_many_rows_whose_last_chunk_is_short(level: str, columns: int) -> None:
    weight = uneven(24, columns, IntWeight(bits=4))
    for dtype in BOUNDS:
        check(grouped.build(weight), weight, dtype, 11)
