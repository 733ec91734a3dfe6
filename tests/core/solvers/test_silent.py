"""Silent inputs: an average weight in a Hessian, and middle magnitudes for scales."""

from __future__ import annotations

import pytest
import torch

from harness.core.solvers.silent import fill_silent, magnitudes


def test_silent_inputs_get_the_mean_of_the_diagonal() -> None:
    X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    X[:, [1, 4]] = 0
    H = X.T @ X
    before = H.clone()
    with pytest.warns(UserWarning, match="^2 of 6 input channels were silent on the calibration tokens; "):
        filled, silent = fill_silent(H)
    assert silent.nonzero().flatten().tolist() == [1, 4]
    assert torch.equal(H, before)
    assert filled[1, 1] == filled[4, 4] == H.diagonal()[[0, 2, 3, 5]].mean()
    assert float(filled.diagonal().mean() / filled[1, 1]) == pytest.approx(1)  # damping stays the same
    filled[1, 1] = filled[4, 4] = 0
    assert torch.equal(filled, H)


@pytest.mark.parametrize("hessian", [torch.eye(4), torch.zeros(4, 4)])
def test_without_silent_inputs_or_only_with_them_nothing_changes(
    hessian: torch.Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    assert fill_silent(hessian)[0] is hessian
    assert not recwarn.list


def test_magnitudes_have_the_floor_of_the_authors_for_usual_inputs() -> None:
    values = torch.tensor([3.0, 0.02, 1e-6])
    assert torch.equal(magnitudes(values, 1e-4), values.clamp(min=1e-4))
    assert torch.equal(magnitudes(torch.zeros(3), 1e-4), torch.full((3,), 1e-4))


def test_magnitudes_of_tiny_inputs_stay_different() -> None:
    values = torch.tensor([3e-8, 2e-10, 1e-14])
    assert torch.equal(magnitudes(values, 1e-4)[:2], values[:2])
    assert float(magnitudes(values, 1e-4)[2]) == pytest.approx(3e-11)


def test_silent_inputs_have_a_middle_magnitude() -> None:
    values = torch.tensor([0.0, 4.0, 0.25, 1.0, 0.0])
    assert magnitudes(values, 1e-4).tolist() == [1.0, 4.0, 0.25, 1.0, 1.0]
