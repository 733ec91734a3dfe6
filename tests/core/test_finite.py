"""The test of tensors for values that are NaN or infinite."""

from __future__ import annotations

import math

import pytest
import torch

from harness.core.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 5), (6, 36)])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float, place: tuple[int, int]) -> None:
    values = torch.randn(7, 37).to(dtype)
    assert all_finite(values)
    values[place] = value
    assert not all_finite(values)


def test_no_values_are_finite() -> None:
    assert all_finite(torch.empty(0, 3))
