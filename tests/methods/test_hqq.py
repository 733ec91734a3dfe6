"""Compare HQQ with float64 loops and its shrinkage with brute force; its objective must not be worse than RTN's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.config import build
from harness.core import IntQTensor, IntWeight, Scheme, Stats, round_to_nearest
from methods.hqq import HQQ, shrink
from tests.conftest import resolve
from tests.support.reference import FORMATS, naive_hqq, naive_shrink

ASYMMETRIC = [name for name, fmt in FORMATS.items() if not fmt.symmetric]
ROWS, COLUMNS = 5, 24


def weights(seed: int = 1, rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights; each group has a different range and offset, and some ranges are so wide that errors become outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + torch.randn(rows, 1, generator=generator)
    return (weight * torch.rand(rows, columns, generator=generator).mul(4).exp() * 0.05).to(dtype)


def solve(weight: Tensor, fmt: IntWeight, **options: Any) -> IntQTensor:
    qtensor = HQQ(**options).quantize(weight, Scheme(name="test", weight=fmt), Stats())
    assert isinstance(qtensor, IntQTensor)
    return qtensor


def mean_error(weight: Tensor, qtensor: IntQTensor) -> float:
    """Mean |W - W'|, the error of the paper's stopping criterion."""
    return float((weight.double() - qtensor.dequantize(torch.float64)).abs().mean())


@pytest.mark.parametrize("options", [{}, {"beta": 1.0, "beta_growth": 1.5}, {"norm": 1.0, "beta": 30.0}])
@pytest.mark.parametrize("name", ASYMMETRIC)
def test_codes_are_those_of_a_loop_over_groups(name: str, options: dict[str, float]) -> None:
    weight, fmt = weights(), FORMATS[name]
    used = {"norm": 0.7, "beta": 10.0, "beta_growth": 1.01} | options
    expected = naive_hqq(weight, fmt, used["norm"], used["beta"], used["beta_growth"], 20)
    qtensor = solve(weight, fmt, **options)
    assert qtensor.codes.tolist() == expected.codes
    assert (qtensor.dequantize().double() - expected.decoded).norm() <= 1e-6 * expected.decoded.norm()
    assert mean_error(weight, qtensor) == pytest.approx(expected.loss, rel=1e-5)


def test_options_change_the_result() -> None:
    weight, fmt = weights(rows=40), FORMATS["float_zero"]
    default = solve(weight, fmt)
    for options in ({"beta": 1.0}, {"norm": 0.2}, {"iterations": 1}, {"round_zero": False}):
        assert not torch.equal(solve(weight, fmt, **options).zero_points(), default.zero_points()), options


def test_no_iterations_are_round_to_nearest() -> None:
    for name in ASYMMETRIC:
        nearest = round_to_nearest(weights(), FORMATS[name])
        assert torch.equal(solve(weights(), FORMATS[name], iterations=0, round_zero=False).codes, nearest.codes)


@pytest.mark.parametrize("norm", [0.1, 0.7, 1.0])
def test_shrinkage_value_by_value(norm: float) -> None:
    errors = torch.cat([torch.linspace(-3, 3, 101), torch.tensor([0.0, 1e-12])]).double()
    e = shrink(errors, 2.0, norm)
    expected = torch.tensor([naive_shrink(float(error), 2.0, norm) for error in errors], dtype=torch.float64)
    assert isinstance(e, Tensor)
    torch.testing.assert_close(e, expected, rtol=1e-12, atol=0)
    edge = 2.0 ** (-1 / (2 - norm))
    assert bool((e[errors.abs() <= edge] == 0).all())
    assert bool((e[errors.abs() > edge * 1.001] != 0).all())
    assert shrink(errors[errors.abs() <= edge], 2.0, norm) == 0.0


@pytest.mark.parametrize("beta", [0.5, 2.0, 10.0])
def test_shrinkage_solves_its_problem(beta: float) -> None:
    """Brute force over e: exact for p = 1; for p < 1, outliers are nearer to the minimum than without shrinkage."""
    candidates = torch.linspace(-5, 5, 200_001, dtype=torch.float64)
    for norm in (1.0, 0.7):
        for error in (-4.0, -2.5, -0.3, 0.02, 2.2, 4.9):
            cost = candidates.abs() ** norm + beta / 2 * (candidates - error) ** 2
            best = float(candidates[cost.argmin()])
            e = float(torch.as_tensor(shrink(torch.tensor([error], dtype=torch.float64), beta, norm)))
            if norm == 1:
                assert e == pytest.approx(best, abs=1e-4)
            elif abs(error) > 4 / beta:
                assert abs(e - best) < abs(error - best)


@settings(max_examples=40)
@given(
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["group", "channel", "tensor"]),
    zero_point=st.sampled_from(["integer", "float"]),
    groups=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_never_worse_than_round_to_nearest_in_its_own_error(
    bits: int, granularity: Any, zero_point: Any, groups: int, seed: int
) -> None:
    size = 7 if granularity == "group" else -1
    fmt = IntWeight(bits=bits, granularity=granularity, group_size=size, zero_point=zero_point)
    weight = weights(seed, 3, 7 * groups, torch.float32)
    qtensor, nearest = solve(weight, fmt, round_zero=False), round_to_nearest(weight, fmt)
    assert mean_error(weight, qtensor) <= mean_error(weight, nearest) * (1 + 1e-6)
    assert int(qtensor.codes.max()) <= fmt.max_code
    assert qtensor.scale.shape == nearest.scale.shape
    assert qtensor.stored_bits == nearest.stored_bits


def test_float_zero_points_move_and_integer_ones_stay() -> None:
    weight = weights(rows=30, dtype=torch.float32)
    for zero_point in ("float", "integer"):
        fmt = IntWeight(bits=3, granularity="group", group_size=8, zero_point=zero_point)
        qtensor, start = solve(weight, fmt), solve(weight, fmt, iterations=0)
        moved = float((qtensor.zero_points() != start.zero_points()).float().mean())
        fitted = float((qtensor.scale != start.scale).float().mean())
        assert (moved > 0.5, fitted) == (True, 0.0) if zero_point == "float" else moved == 0 < 0.5 < fitted
        assert mean_error(weight, qtensor) < 0.97 * mean_error(weight, start)


def test_rows_do_not_affect_each_other() -> None:
    fmt = IntWeight(bits=3, granularity="group", group_size=64, zero_point="float")
    weight = weights(3, 300, 1024, torch.float32)  # solved in several parts
    qtensor, order = solve(weight, fmt), torch.randperm(300)
    assert torch.equal(qtensor.codes[order], solve(weight[order], fmt).codes)
    assert torch.equal(qtensor.codes[7:9], solve(weight[7:9], fmt).codes)


def test_an_integer_start_keeps_zero_near_a_code() -> None:
    """Weights with a large offset and many zeros: the integer start decodes zeros more exactly."""
    weight = weights(5, 50, 64, torch.float32)
    weight[:, ::3] = 0
    fmt = IntWeight(bits=3, granularity="group", group_size=32, zero_point="float")
    integer_start, float_start = (
        solve(weight, fmt, round_zero=on, iterations=0).dequantize()[:, ::3] for on in (True, False)
    )
    assert float(integer_start.abs().max()) < 1e-6 < float(float_start.abs().mean())


def test_groups_far_from_zero_are_refused_with_the_remedy() -> None:
    fmt = IntWeight(bits=4, zero_point="float")
    far = 1000 + torch.arange(64.0).view(1, 64) * 1e-4
    with pytest.raises(ValueError, match="cannot hold the zero point .* use scheme.weight.scale_dtype=float32"):
        solve(far, fmt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 0.0}, "norm=0.0 is out of range; expected more than 0, at most 1"),
        ({"norm": 1.5}, "norm=1.5 is out of range"),
        ({"beta": 0.0}, "beta=0.0 is out of range; expected more than 0"),
        ({"beta": float("nan")}, "beta=nan is out of range"),
        ({"beta_growth": 0.9}, "beta_growth=0.9 is out of range; expected 1 or more"),
        ({"iterations": -1}, "iterations=-1 is out of range; expected 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HQQ(**options)


def test_its_yaml_stores_float_zero_points_and_the_command_line_wins() -> None:
    for scheme in ("group64", "channel", "tensor"):
        assert resolve("method=hqq", f"scheme={scheme}")["scheme"]["weight"]["zero_point"] == "float"
    chosen = resolve("method=hqq", "scheme.weight.zero_point=integer")["scheme"]
    assert chosen["weight"]["zero_point"] == "integer"
    HQQ().check(build(Scheme, chosen, "scheme"))
    with pytest.raises(
        ValueError,
        match="scheme=group64_sym is symmetric, but hqq adjusts zero points; use an asymmetric scheme such as .*64$",
    ):
        HQQ().check(build(Scheme, resolve("scheme=group64_sym")["scheme"], "scheme"))
    with pytest.raises(ValueError, match="scheme=none leaves the format of weights to the method"):
        HQQ().check(build(Scheme, resolve("scheme=none")["scheme"], "scheme"))
