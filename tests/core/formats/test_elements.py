"""Small floats: every value, torch's own dtypes, and rounding by brute force over all values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.core.formats.elements import KNOWN, element, power_of_two

NAMES = [*KNOWN, "e1m2", "e3m4", "e4m1"]


def finite_levels(name: str) -> Tensor:
    levels = element(name).levels
    return levels[torch.isfinite(levels)]


def samples(name: str) -> Tensor:
    """Values around every level and every midpoint of two levels, on both sides, and beyond the largest."""
    levels = finite_levels(name).double().unique()
    middles = (levels[1:] + levels[:-1]) / 2
    exact = torch.cat([levels, middles, levels[-1:] * 1.02, levels[:1] * 3])
    return torch.cat([exact, exact * (1 + 1e-6), exact * (1 - 1e-6)]).float()


def test_the_levels_of_e2m1_are_those_of_the_specification() -> None:
    assert element("e2m1").levels.tolist() == [
        *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
        *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
    ]


@pytest.mark.parametrize(
    ("name", "largest", "exponent", "smallest_normal", "step"),
    [
        ("e4m3", 448.0, 8, 2.0**-6, 2.0**-9),
        ("e5m2", 57344.0, 15, 2.0**-14, 2.0**-16),
        ("e3m2", 28.0, 4, 0.25, 0.0625),
        ("e2m3", 7.5, 2, 1.0, 0.125),
        ("e2m1", 6.0, 2, 1.0, 0.5),
    ],
)
def test_limits_of_the_specifications(
    name: str, largest: float, exponent: int, smallest_normal: float, step: float
) -> None:
    kind = element(name)
    assert (kind.largest, kind.largest_exponent, kind.smallest_normal, kind.step) == (
        largest,
        exponent,
        smallest_normal,
        step,
    )


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_codes_levels_and_rounding_are_those_of_torch(name: str) -> None:
    kind = element(name)
    assert kind.dtype is not None
    own = torch.arange(256, dtype=torch.uint8).view(kind.dtype).float()
    finite = torch.isfinite(own)
    assert torch.equal(kind.levels[finite], own[finite])
    assert torch.isnan(kind.levels[~finite]).all()
    values = torch.cat([samples(name), torch.randn(10_000) * 100])
    expected = values.clamp(-kind.largest, kind.largest).to(kind.dtype)
    rounded = kind.round_(values.clone())
    assert torch.equal(rounded, expected.float())
    assert torch.equal(kind.encode(rounded), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_rounding_takes_the_nearest_level_and_the_even_code_of_two(name: str, dtype: torch.dtype) -> None:
    kind, values = element(name), samples(name).to(dtype)
    levels = kind.levels[: 1 << kind.bits - 1].double()
    distance = (values.double().abs()[:, None] - levels.nan_to_num(torch.inf)).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = torch.arange(len(levels)) % 2 == 0
    codes = torch.where(nearest.sum(1) > 1, (nearest & even).int().argmax(1), nearest.int().argmax(1))
    rounded = kind.round_(values.clone())
    assert rounded.dtype == dtype
    assert torch.equal(rounded.double(), levels[codes] * torch.where(values < 0, -1.0, 1.0).double())
    assert torch.equal(kind.encode(rounded) & (1 << kind.bits - 1) - 1, codes.to(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_levels_are_their_places(name: str) -> None:
    kind = element(name)
    places = torch.arange(1 << kind.bits)[torch.isfinite(kind.levels)]
    assert kind.encode(finite_levels(name)).tolist() == places.tolist()


@given(st.sampled_from(NAMES), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_twice_changes_nothing_and_keeps_the_sign(name: str, value: float) -> None:
    once = element(name).round_(torch.tensor([value]))
    assert torch.equal(element(name).round_(once.clone()), once)
    assert torch.signbit(once).item() == (math.copysign(1, value) < 0)


def test_values_that_are_not_finite() -> None:
    rounded = element("e2m1").round_(torch.tensor([math.inf, -math.inf, math.nan]))
    assert rounded[:2].tolist() == [6.0, -6.0]
    assert math.isnan(rounded[2])


@pytest.mark.parametrize("name", ["e5m3", "e3m0", "int4", "e2m1fn", "e0m3", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"element={name} is no float of 3 to 8 bits; expected e and the bits"):
        element(name)


def test_powers_of_two() -> None:
    values = torch.tensor([0.0, 1.0, 1.99, 2.0, -3.0, 2.0**-126, 2.0**-140])
    assert power_of_two(values).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 2.0**-126, 0.0]
    assert power_of_two(values.double())[-1] == 2.0**-140
