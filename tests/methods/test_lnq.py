"""LNQ against least squares and exhaustive search in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from harness.core import Hessian, LearnedWeight, Scheme, Stats, round_to_nearest
from harness.core.formats.learned_weight import LearnedQTensor, fit_levels
from harness.core.formats.levels import ranks
from methods.gptq import GPTQ
from methods.lnq import LNQ, _refit

ROWS, COLUMNS, TOKENS, DAMP = 5, 20, 80, 0.01
FORMAT = LearnedWeight(levels="learned", bits=2, levels_dtype="float32")


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, COLUMNS, generator=generator).double() * torch.linspace(0.01, 0.1, ROWS)[:, None]


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator).mul(2).exp()
    return (torch.randn(TOKENS, COLUMNS, generator=generator) @ mix).double()


def damped(X: Tensor) -> Tensor:
    H = 2 / len(X) * X.T @ X
    return H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS)


def solve(**options: int) -> LearnedQTensor:
    stats = Stats([Hessian], COLUMNS)
    stats.update(inputs())
    quantized = LNQ(damp=DAMP, **options).quantize(weights(), Scheme(name="test", weight=FORMAT), stats)
    assert isinstance(quantized, LearnedQTensor)
    return quantized


def losses(decoded: Tensor) -> Tensor:
    """The squared error of each row, by the damped Hessian."""
    delta = decoded.double() - weights()
    return ((delta @ damped(inputs())) * delta).sum(1)


def test_levels_are_the_least_squares_of_each_row() -> None:
    levels = fit_levels(weights(), 4)
    codes = ranks(weights(), levels).long()
    codes[0] = torch.arange(COLUMNS) % 2  # two levels without a weight
    fitted, moved = _refit(weights(), damped(inputs()), levels, codes)
    assert torch.equal(fitted, fitted.sort(1).values)
    factor = torch.linalg.cholesky(damped(inputs()), upper=True)
    for row in range(1, ROWS):
        P = torch.nn.functional.one_hot(codes[row], 4).double()
        expected = torch.linalg.lstsq(factor @ P, factor @ weights()[row]).solution
        torch.testing.assert_close(fitted[row].gather(0, moved[row]), expected.gather(0, codes[row]), rtol=1e-4, atol=0)
    assert set(levels[0, 2:].tolist()) <= {float(x) for x in fitted[0]} or torch.allclose(
        fitted[0].sort().values[-2:], levels[0, 2:], rtol=1e-3
    )


@pytest.mark.parametrize("block", [1, 3, 64])
def test_no_change_of_one_code_lowers_the_error(block: int) -> None:
    quantized = solve(cycles=30, column_block=block)
    found = losses(quantized.dequantize(torch.float64))
    codes, levels = quantized.codes.long(), quantized.levels.double()
    for column, code in itertools.product(range(COLUMNS), range(4)):
        changed = codes.clone()
        changed[:, column] = code
        assert (losses(levels.gather(1, changed)) >= found * (1 - 1e-9)).all()


def test_blocks_of_columns_change_nothing() -> None:
    assert torch.equal(solve(column_block=1).codes, solve(column_block=7).codes)


def test_the_error_falls_with_rounds_and_below_that_of_gptq() -> None:
    stats = Stats([Hessian], COLUMNS)
    stats.update(inputs())
    scheme = Scheme(name="test", weight=FORMAT)
    by_gptq = losses(GPTQ(damp=DAMP).quantize(weights(), scheme, stats).dequantize(torch.float64)).sum()
    by_rounds = [losses(solve(rounds=rounds).dequantize(torch.float64)).sum() for rounds in (1, 3, 10)]
    nearest = losses(round_to_nearest(weights(), FORMAT).dequantize(torch.float64)).sum()
    assert by_rounds[2] <= by_rounds[1] <= by_rounds[0] < by_gptq < nearest


def test_weights_decide_where_levels_are() -> None:
    rows = torch.tensor([[0.0, 0.1, 5.0, 5.1]])
    plain, weighted = fit_levels(rows, 2), fit_levels(rows, 2, torch.tensor([1.0, 3.0, 1.0, 0.0]))
    torch.testing.assert_close(plain, torch.tensor([[0.05, 5.05]]))
    torch.testing.assert_close(weighted, torch.tensor([[0.075, 5.0]]))
