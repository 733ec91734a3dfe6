"""The transforms: orthogonal for any size, Hadamard matrices for Paley's sizes, equal to their Kronecker product."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.core.hadamard import factors, random_signs, rotate, unrotate

HADAMARD = [1, 2, 64, 4096, 12, 20, 28, 36, 44, 60, 68, 192, 576, 768, 896, 1536, 3072, 14336]


def dense(size: int) -> Tensor:
    return functools.reduce(torch.kron, factors(size))


@pytest.mark.parametrize("size", HADAMARD[:-2])
def test_entries_are_all_of_one_magnitude(size: int) -> None:
    magnitude = dense(size).abs()
    torch.testing.assert_close(magnitude, torch.full_like(magnitude, 1 / math.sqrt(size)))


@given(size=st.integers(1, 400))
def test_any_size_is_orthogonal_and_flat(size: int) -> None:
    matrix = dense(size)
    assert (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12
    assert matrix.abs().max() <= math.sqrt(2 / size) + 1e-12


@pytest.mark.parametrize("size", [1, 7, 24, 48, 86, 576, 1536])
def test_rotating_is_the_product_with_the_matrix(size: int) -> None:
    values = torch.randn(2, 3, size, dtype=torch.float64)
    torch.testing.assert_close(rotate(values), values @ dense(size))
    torch.testing.assert_close(unrotate(values), values @ dense(size).T)
    torch.testing.assert_close(unrotate(rotate(values.float())), values.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [*HADAMARD, 11008, 13824, 18944])
def test_large_sizes_keep_norms_and_are_inverted(size: int) -> None:
    values = torch.randn(2, size)
    rotated = rotate(values)
    torch.testing.assert_close(rotated.norm(dim=-1), values.norm(dim=-1))
    torch.testing.assert_close(unrotate(rotated), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [576, 1536, 11008])
def test_with_random_signs_a_spike_becomes_flat(size: int) -> None:
    spiked = torch.randn(4, size) * 0.01
    spiked[:, 3] = 100
    signs = random_signs(size, torch.Generator().manual_seed(0))
    assert set(signs.tolist()) == {-1.0, 1.0}
    rotated = rotate(spiked * signs)
    assert rotated.abs().amax() <= 1.6 * rotated.square().mean().sqrt()


def test_a_size_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="^size=0 is out of range; expected 1 or more"):
        factors(0)


def test_a_matrix_made_in_inference_mode_can_be_trained_through() -> None:
    size = 88  # of no other test, so that its factors are made here
    with torch.inference_mode():
        rotate(torch.ones(size))
    values = torch.ones(size, requires_grad=True)
    rotate(values).square().sum().backward()
    torch.testing.assert_close(values.grad, 2 * torch.ones(size))
