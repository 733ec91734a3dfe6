"""Intervals: quantiles of t, coverage of a known truth, degenerate windows, and runs that cannot be paired."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.records import Record, Text, Texts, Weights
from harness.reports.intervals import FEWEST, difference, interval, intervals, t_quantile, windows


def run(nll: list[float], fingerprint: str = "f", tokens: str = "t", seq_len: int = 8, run_id: str = "r") -> Record:
    texts = Texts(evaluation=Text(tokens_sha256=tokens, seq_len=seq_len))
    return Record(run_id=run_id, model=Weights(fingerprint=fingerprint), data=texts, window_nll=nll)


@pytest.mark.parametrize(
    ("tail", "freedom", "known"),  # NIST handbook 1.3.6.7.2, with more digits
    [
        (0.025, 1, 12.7062047),
        (0.025, 2, 4.3026527),
        (0.025, 3, 3.1824463),
        (0.025, 4, 2.7764451),
        (0.025, 5, 2.5705818),
        (0.025, 19, 2.0930241),
        (0.005, 10, 3.1692727),
        (0.05, 30, 1.6972609),
        (0.025, 1000, 1.9623391),
    ],
)
def test_quantiles_of_t(tail: float, freedom: int, known: float) -> None:
    assert t_quantile(tail, freedom) == pytest.approx(known, rel=1e-7)


@pytest.mark.parametrize(("count", "how"), [(3, "t"), (FEWEST - 1, "t"), (10, "bootstrap"), (40, "bootstrap")])
def test_the_interval_holds_the_truth_as_often_as_it_says(count: int, how: str) -> None:
    truth, trials = 0.3, 1500
    made = intervals(np.random.default_rng(count).normal(truth, 2.0, (trials, count)))
    held = np.mean([found.low <= truth <= found.high for found in made])
    assert {found.how for found in made} == {how}
    assert abs(held - 0.95) < 0.0225  # four standard errors of such a count


def test_the_bootstrap_follows_a_skew_that_t_does_not() -> None:
    values = np.random.default_rng(0).exponential(size=15).tolist()
    found = interval(values)
    assert found.how == "bootstrap"
    assert found.high - found.mean > 1.1 * (found.mean - found.low)


def test_five_windows_have_the_interval_of_a_textbook() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])  # mean 3, deviation sqrt(2.5), t 2.7764
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (found.mean, found.n, found.how) == (3.0, 5, "t")
    assert [found.low, found.high] == pytest.approx([3 - half, 3 + half], rel=1e-7)


def test_pairs_leave_out_what_both_runs_share() -> None:
    common = np.random.default_rng(1).normal(3.0, 0.5, 20)
    apart = 0.01 + np.random.default_rng(2).normal(0.0, 0.002, 20)
    found = difference(run((common + apart).tolist()), run(common.tolist()))
    alone = interval((common + apart).tolist())
    assert found.sure
    assert found.low < 0.01 < found.high
    assert alone.high - alone.low > 50 * (found.high - found.low)
    assert found.ratio == tuple(math.exp(value) for value in (found.mean, found.low, found.high))


def test_the_same_windows_give_the_same_interval_again() -> None:
    values = np.random.default_rng(3).normal(size=9).tolist()
    assert interval(values) == interval(values)


@pytest.mark.parametrize("count", [2, 5, 6, 30])
def test_equal_windows_leave_no_width_and_no_claim(count: int) -> None:
    nll = [3.0 + 0.1 * i for i in range(count)]
    found = difference(run(nll), run(list(nll)))
    assert (found.mean, found.low, found.high, found.sure) == (0.0, 0.0, 0.0, False)
    shifted = interval([0.25] * count)
    assert (shifted.low, shifted.high, shifted.sure) == (0.25, 0.25, True)


def test_one_window_has_no_interval() -> None:
    found = difference(run([3.0]), run([2.0]))
    assert (found.mean, found.n, found.how, found.sure) == (1.0, 1, "none", False)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run([1.0, 2.0], fingerprint="g", run_id="o"), "fingerprint=f of run r and g of run o cannot be compared"),
        (run([1.0, 2.0], tokens="u", run_id="o"), "tokens_sha256=t of run r and u of run o cannot be compared"),
        (run([1.0, 2.0], seq_len=9, run_id="o"), "seq_len=8 of run r and 9 of run o cannot be compared"),
        (run([1.0], run_id="o"), "window_nll has 2 windows in run r and 1 in run o"),
    ],
)
def test_runs_of_other_tokens_are_refused(other: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        difference(run([1.0, 2.0]), other)


def test_what_was_not_measured_has_no_windows() -> None:
    failed = run([1.0, 2.0])
    failed.status = "failed"
    assert windows(failed) == []
    with pytest.raises(ValueError, match="window_kl has 0 windows"):
        difference(run([1.0]), run([1.0]), "window_kl")
    with pytest.raises(ValueError, match="an interval of 0 windows does not exist; expected 1 or more"):
        interval([])


def test_a_difference_beyond_floats_is_an_infinite_ratio() -> None:
    assert difference(run([800.0, 801.0]), run([1.0, 1.0])).ratio[0] == math.inf
