"""The native beam search of additive codebooks chooses the same codes as the torch code, at each level of features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.core import operators
from harness.core.solvers import additive_fit
from harness.core.solvers.additive_fit import Fit, Problem
from tests.support.kernels import built

pytestmark = built

# rows, columns, codebooks, entries, beam: rows below and above those searched at once, one row, greedy, wider beams
SHAPES = [(70, 64, 2, 256, 4), (1, 16, 2, 256, 4), (300, 24, 3, 256, 3), (90, 16, 2, 512, 5), (66, 8, 1, 1024, 2)]
SHAPES += [(64, 72, 2, 256, 1), (1030, 8, 2, 256, 4)]


def searched(problem: Problem, fit: Fit, beam: int) -> Tensor:
    """The codes after one search that starts at `fit`."""
    result = replace(fit)
    problem.search(result, beam, torch.Generator().manual_seed(0))
    return result.codes


def start(rows: int, columns: int, codebooks: Tensor, scale: Tensor) -> Fit:
    books, entries, size = codebooks.shape
    return Fit(torch.randint(0, entries, (columns // size, books, rows)), codebooks, scale)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_search_is_that_of_torch_where_sums_are_exact(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All values are small integers: any order of sums is exact, and many candidates are equally good."""
    rows, columns, books, entries, beam = shape
    problem = Problem(torch.randint(-9, 10, (rows, columns)).float(), torch.eye(columns), 8)
    fit = start(rows, columns, torch.randint(-4, 5, (books, entries, 8)).float(), torch.ones(rows))
    monkeypatch.setattr(additive_fit, "_same_scores", lambda *_: True)
    native = searched(problem, fit, beam)
    monkeypatch.setattr(operators, "namespace", lambda: None)
    assert torch.equal(native, searched(problem, fit, beam))
    assert not torch.equal(native, fit.codes)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_search_is_that_of_torch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, books, entries, beam = shape
    inputs = torch.randn(4 * columns, columns) * torch.rand(columns).exp()
    problem = Problem(torch.randn(rows, columns), inputs.T @ inputs / len(inputs), 8)
    fit = start(rows, columns, torch.randn(books, entries, 8) / 2, torch.rand(rows) + 0.5)
    native = searched(problem, fit, beam)
    monkeypatch.setattr(operators, "namespace", lambda: None)
    assert torch.equal(native, searched(problem, fit, beam))


@pytest.mark.usefixtures("level")
def test_scores_are_sums_of_eight_products_in_their_order() -> None:
    """The order in which torch's library must add, too; here each sum is computed in float64 and rounded."""
    targets, norms, table = torch.randn(5, 8), torch.randn(272), torch.randn(8, 272)
    sums, squares = torch.zeros(5, 272), torch.zeros(5)
    for k in range(8):
        sums = (targets[:, k : k + 1].double() * table[k].double() + sums.double()).float()
        squares = squares + targets[:, k] * targets[:, k]
    scores = operators.operator("additive_scores")
    assert scores is not None
    native, lengths = scores(targets, norms, table)
    assert torch.equal(native, sums + norms)
    assert torch.equal(lengths, squares)


def test_other_bits_than_those_of_torch_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def reversed_order(targets: Tensor, norms: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addmm(norms, targets.flip(1), table.flip(0)), targets.square().sum(1)

    rows = torch.zeros(64, 16)
    monkeypatch.setattr(additive_fit, "operator", lambda name: reversed_order)
    assert additive_fit._native(rows, 8, 256, 4) is None
    monkeypatch.setattr(
        additive_fit, "operator", lambda name: lambda t, n, b: (torch.addmm(n, t, b), t.square().sum(1))
    )
    assert additive_fit._native(rows, 8, 256, 4) is not None
    assert additive_fit._native(rows, 4, 256, 4) is None
    assert additive_fit._native(rows, 8, 128, 4) is None
