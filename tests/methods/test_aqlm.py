"""Compare each step of AQLM with the same error in float64, exhaustive search, least squares and planted weights."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import Hessian, IntWeight, Scheme, Stats
from harness.core.formats import AdditiveQTensor
from harness.core.solvers.additive_fit import Fit, Problem
from methods.aqlm import AQLM
from tests.conftest import resolve

ROWS, COLUMNS, SIZE = 7, 24, 4
GROUPS = COLUMNS // SIZE


NONE = Scheme(name="none", weight=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(columns: int = COLUMNS, tokens: int = 80) -> Tensor:
    """Correlated inputs with a few large channels."""
    mix = (
        torch.randn(columns, columns, generator=generator(1)) * torch.rand(columns, generator=generator(2)).mul(2).exp()
    )
    return torch.randn(tokens, columns, generator=generator(3)) @ mix


def weights(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Weights whose rows have different scales."""
    return torch.randn(rows, columns, generator=generator(4)) * torch.linspace(0.01, 0.2, rows)[:, None]


def stats_of(X: Tensor) -> Stats:
    stats = Stats([Hessian], X.shape[1])
    stats.update(X)
    return stats


def hessian(columns: int = COLUMNS) -> Tensor:
    X = inputs(columns)
    return X.T @ X / len(X) + 0.1 * torch.eye(columns)


def random_fit(bits: int = 3, count: int = 2, seed: int = 5) -> Fit:
    codes = torch.randint(0, 1 << bits, (GROUPS, count, ROWS), generator=generator(seed))
    codebooks = torch.randn(count, 1 << bits, SIZE, generator=generator(seed + 1))
    return Fit(codes, codebooks, torch.linspace(0.02, 0.3, ROWS).flip(0))


def decoded(fit: Fit) -> Tensor:
    """The weight in float64, one group of one row at a time."""
    count = fit.codes.shape[1]
    rows = []
    for r in range(len(fit.scale)):
        parts = [
            torch.stack([fit.codebooks[m, group_codes[m, r]].double() for m in range(count)]).sum(0)
            for group_codes in fit.codes
        ]
        rows.append(float(fit.scale[r]) * torch.cat(parts))
    return torch.stack(rows)


def row_losses(weight: Tensor, decoded_weight: Tensor, H: Tensor) -> list[float]:
    """The loss d H d^T of each row, d = w - w', one product at a time."""
    losses = []
    for row, other in zip(weight.double(), decoded_weight.double(), strict=True):
        d = row - other
        losses.append(sum(float(d[i] * H[i, j] * d[j]) for i in range(len(d)) for j in range(len(d))))
    return losses


def test_the_error_is_that_of_rows_one_by_one() -> None:
    problem, fit = Problem(weights(), hessian(), SIZE), random_fit()
    expected = row_losses(weights(), decoded(fit), hessian())
    assert len({round(loss, 6) for loss in expected}) == ROWS
    assert problem.loss(fit) == pytest.approx(sum(expected), rel=1e-5)
    _, after = problem.rescale(fit)
    assert after == pytest.approx(sum(row_losses(weights(), decoded(fit), hessian())), rel=1e-4)
    assert after < sum(expected)


def test_scales_are_the_best_of_each_row() -> None:
    problem, fit = Problem(weights(), hessian(), SIZE), random_fit()
    vectors = decoded(fit) / fit.scale.double()[:, None]
    slope, _ = problem.rescale(fit)
    exact = hessian().double()
    for r in range(ROWS):
        w, v = weights()[r].double(), vectors[r]
        assert float(fit.scale[r]) == pytest.approx(float(w @ exact @ v) / float(v @ exact @ v), rel=1e-4)
    expected = (weights().double() - decoded(fit)) @ exact
    assert (slope.double() - expected).norm() <= 1e-5 * expected.norm()


def test_a_row_of_zeros_gets_scale_zero() -> None:
    weight, fit = weights(), random_fit()
    weight[2] = 0
    problem = Problem(weight, hessian(), SIZE)
    problem.rescale(fit)
    assert fit.scale[2] == 0
    problem.search(fit, 1, generator())
    assert torch.isfinite(fit.vectors()).all()


def least_squares(weight: Tensor, fit: Fit, H: Tensor) -> float:
    """The error of the best codebooks for fixed codes and scales, by lstsq on (W - W') L with H = L L^T."""
    lower = torch.linalg.cholesky(H.double())
    count, entries, size = fit.codebooks.shape
    columns = []
    for m, c, k in itertools.product(range(count), range(entries), range(size)):
        used = torch.zeros(ROWS, GROUPS, size, dtype=torch.float64)
        used[:, :, k] = fit.codes[:, m].T.eq(c).double()
        columns.append((fit.scale.double()[:, None] * used.view(ROWS, -1) @ lower).reshape(-1))
    system, target = torch.stack(columns, 1), (weight.double() @ lower).reshape(-1)
    solution = torch.linalg.lstsq(system, target[:, None], driver="gelsd").solution[:, 0]
    return float((target - system @ solution).square().sum())


@pytest.mark.parametrize("count", [1, 2])
def test_codebooks_reach_the_least_squares_solution(count: int) -> None:
    fit = random_fit(bits=2, count=count)
    problem = Problem(weights(), hessian(), SIZE)
    best = least_squares(weights(), fit, hessian())
    losses = [problem.loss(fit)]
    for steps in (1, 1, 2, 100):
        slope = (weights() - fit.scale[:, None] * fit.vectors()) @ hessian()
        problem.refit(fit, slope, steps)
        losses.append(problem.loss(fit))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * best
    assert losses[-1] == pytest.approx(best, rel=1e-3)


def test_an_entry_without_vectors_stays_finite() -> None:
    fit = random_fit(bits=3)
    fit.codes.clamp_(max=3)
    problem = Problem(weights(), hessian(), SIZE)
    slope, before = problem.rescale(fit)
    problem.refit(fit, slope, 10)
    assert torch.isfinite(fit.codebooks).all()
    assert problem.loss(fit) < before


@pytest.mark.parametrize("beam", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_search_raises_no_row_s_error(count: int, beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.core.solvers.additive_fit._COLUMNS", 2 * SIZE)
    monkeypatch.setattr("harness.core.solvers.additive_fit._SCORES", 1)
    monkeypatch.setattr("harness.core.solvers.additive_fit._LEAST_ROWS", 3)
    fit, problem = random_fit(count=count), Problem(weights(), hessian(), SIZE)
    problem.rescale(fit)
    losses = [row_losses(weights(), decoded(fit), hessian())]
    for turn in range(3):
        problem.search(fit, beam, generator(turn))
        losses.append(row_losses(weights(), decoded(fit), hessian()))
        assert all(new <= old * (1 + 1e-5) for old, new in zip(*losses[-2:], strict=True))
    assert sum(losses[-1]) < 0.8 * sum(losses[0])


def test_a_wide_beam_finds_the_best_combination_of_a_group() -> None:
    """Two codebooks of 8 vectors and one group: all 64 combinations can be tried, because nothing else changes."""
    H, weight = hessian(SIZE), weights(ROWS, SIZE)
    initial = random_fit()
    losses = {}
    for beam in (1, 8):
        fit = Fit(initial.codes[:1].clone(), initial.codebooks, initial.scale)
        Problem(weight, H, SIZE).search(fit, beam, generator())
        losses[beam] = row_losses(weight, decoded(fit), H)
    for r in range(ROWS):
        losses_of_pairs = []
        for pair in itertools.product(range(8), range(8)):
            vector = initial.codebooks[0, pair[0]] + initial.codebooks[1, pair[1]]
            losses_of_pairs.append(row_losses(weight[r : r + 1], initial.scale[r] * vector[None], H)[0])
        assert losses[8][r] == pytest.approx(min(losses_of_pairs), rel=1e-4)
    assert sum(losses[1]) > sum(losses[8])


def test_one_group_s_code_is_chosen_for_the_errors_of_all_others() -> None:
    """One codebook: trying all codes shows that the last group searched has the best code with the others fixed."""
    H, fit = hessian(), random_fit(count=1)
    problem = Problem(weights(), H, SIZE)
    problem.search(fit, 1, generator())  # all groups fit in one pass, so the last group is searched last
    before = row_losses(weights(), decoded(fit), H)
    for r, c in itertools.product(range(ROWS), range(8)):
        other = Fit(fit.codes.clone(), fit.codebooks, fit.scale)
        other.codes[-1, 0, r] = c
        assert row_losses(weights(), decoded(other), H)[r] >= before[r] * (1 - 1e-4)


def quantize(weight: Tensor, X: Tensor, **options: Any) -> AdditiveQTensor:
    qtensor = AQLM(**options).quantize(weight, NONE, stats_of(X))
    assert isinstance(qtensor, AdditiveQTensor)
    return qtensor


def test_a_weight_that_one_codebook_made_is_recovered_to_float16() -> None:
    """Each row uses every entry once, so that all rows have the same norm, as the k-means initialisation assumes."""
    codebook = torch.randn(16, SIZE, generator=generator(7))
    order = torch.stack([torch.randperm(16, generator=generator(i)) for i in range(50)])
    planted = 0.05 * torch.linspace(0.5, 2, 50)[:, None] * codebook[order].view(50, 16 * SIZE)
    qtensor = quantize(planted, inputs(16 * SIZE), codebooks=1, code_bits=4, group_size=SIZE)
    assert float((qtensor.dequantize() - planted).norm() / planted.norm()) <= 2**-11


def test_more_rounds_and_a_wider_beam_lower_the_error() -> None:
    weight, X = weights(48, 64), inputs(64, 300)
    options = {"code_bits": 5, "group_size": 8}

    def loss(**extra: Any) -> float:
        return float((X @ (quantize(weight, X, **options, **extra).dequantize() - weight).T).square().sum())

    start, one, many = loss(iterations=0), loss(iterations=1), loss(iterations=20, tolerance=0.001)
    assert start > one > many
    assert loss(iterations=20, tolerance=0.001, beam=8) < many


@pytest.mark.parametrize(("count", "bits", "size"), [(2, 8, 8), (1, 4, 4), (3, 5, 8), (1, 9, 8)])
def test_bits_per_weight_are_those_of_the_formula(count: int, bits: int, size: int) -> None:
    rows, columns = 16, 48
    label = max(2, math.ceil(count * bits / size))
    method = AQLM(bits=label, codebooks=count, code_bits=bits, group_size=size, iterations=1, kmeans_iterations=2)
    method.check(NONE)
    qtensor = method.quantize(weights(rows, columns), NONE, stats_of(inputs(columns)))
    stored = 16 * count * size * 2**bits / (rows * columns) + 16 / columns
    assert qtensor.bits_per_weight == pytest.approx(count * bits / size + stored, rel=1e-12)


def test_it_depends_on_the_seed_and_on_nothing_else() -> None:
    weights_by_seed = []
    for seed, global_seed in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(global_seed)
        weights_by_seed.append(quantize(weights(24, 64), inputs(64), code_bits=4, seed=seed).dequantize())
    assert torch.equal(weights_by_seed[0], weights_by_seed[1])
    assert not torch.equal(weights_by_seed[0], weights_by_seed[2])


@pytest.mark.parametrize("factor", [1e-8, 1e5])
def test_extreme_magnitudes_are_shared_by_scales_and_codebooks(factor: float) -> None:
    weight, X = weights(24, 64), inputs(64)
    errors = [float((quantize(weight * by, X, code_bits=5).dequantize() / by - weight).norm()) for by in (1.0, factor)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at most 65504, float16's largest"):
        quantize(weights() * 1e12, inputs(), code_bits=3, group_size=SIZE)


def test_without_tokens_all_inputs_get_equal_weight_with_a_warning() -> None:
    options: dict[str, Any] = {"code_bits": 4, "group_size": SIZE}
    with pytest.warns(UserWarning, match="no calibration token reached this linear; all its inputs get equal weight"):
        without_tokens = AQLM(**options).quantize(weights(), NONE, Stats([Hessian], COLUMNS)).dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal_inputs = AQLM(**options, damp=1e-9).quantize(weights(), NONE, stats_of(torch.eye(COLUMNS))).dequantize()
    assert (without_tokens - equal_inputs).norm() <= 1e-3 * equal_inputs.norm()


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(ValueError, match="the damped Hessian is not positive definite in float32; use a larger damp"):
        Problem(weights(), -hessian(), SIZE)


def test_a_float64_weight_and_an_input_that_is_always_zero() -> None:
    X = inputs()
    X[:, 3] = 0
    qtensor = quantize(weights().double(), X, code_bits=4, group_size=SIZE)
    assert torch.isfinite(qtensor.dequantize(torch.float64)).all()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("codebooks", 0, "1 or more"),
        ("group_size", 0, "1 or more"),
        ("beam", 0, "1 or more"),
        ("codebook_steps", 0, "1 or more"),
        ("iterations", -1, "0 or more"),
        ("kmeans_iterations", -1, "0 or more"),
        ("code_bits", 0, "1 to 16"),
        ("code_bits", 17, "1 to 16"),
        ("tolerance", 1.0, "0 or more, and less than 1"),
        ("tolerance", math.nan, "0 or more, and less than 1"),
        ("damp", 0.0, "more than 0"),
    ],
)
def test_options_out_of_range_are_refused(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{key}={value} is out of range; expected {expected}"):
        AQLM(**{key: value})


def test_schemes_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="scheme=group64 is another format .*; use scheme=none"):
        AQLM().check(Scheme(name="group64", weight=IntWeight(bits=2, granularity="group", group_size=64)))
    with pytest.raises(
        ValueError, match="bits=4 does not match codebooks=2 of code_bits=8 for group_size=8; use bits=2"
    ):
        AQLM(bits=4).check(NONE)
    with pytest.raises(ValueError, match="bits=2 does not match codebooks=3 .*; use bits=3"):
        AQLM(codebooks=3).check(NONE)
    AQLM(codebooks=1, code_bits=8).check(NONE)
    with pytest.raises(ValueError, match="codebooks=9 of code_bits=8 for group_size=8 take 9 bits per weight"):
        AQLM(codebooks=9, bits=8).check(NONE)
    with pytest.raises(
        ValueError, match="group_size=16 does not divide in_features=24; use a divisor, or skip this linear"
    ):
        quantize(weights(), inputs(), group_size=16)


def test_its_yaml_chooses_two_bits_and_the_command_line_wins() -> None:
    chosen = resolve("method=aqlm")
    assert (chosen["bits"], chosen["scheme"]["name"], chosen["method"]["aqlm"]["bits"]) == (2, "none", 2)
    other = resolve("method=aqlm", "bits=3", "method.aqlm.codebooks=3")
    assert (other["bits"], other["method"]["aqlm"]["bits"], other["method"]["aqlm"]["codebooks"]) == (3, 3, 3)
