"""95% intervals of a figure over the windows of a text: of one run, and of the difference of two runs.

Sources: the paired bootstrap, Efron and Tibshirani 1993, An Introduction to the Bootstrap; the expanded percentile
interval, Hesterberg 2015, What Teachers Should Know About the Bootstrap, arXiv 1411.5279: percentiles of a bootstrap of
n values are too narrow by sqrt((n - 1) / n) and know no t, so each tail is Phi(-sqrt(n / (n - 1)) t), where t is the
quantile of Student's distribution with n - 1 degrees of freedom. Windows of one text are taken as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.records import Record, Text

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST = 6  # windows: resamples of fewer have too few distinct means for the level of the tails
_SEED = 0
_SLABS = 10
_LARGEST = 700.0  # its exponential is still a float

Windows = Literal["window_nll", "window_kl"]


@dataclass(frozen=True)
class Interval:
    """A mean over n windows with its interval; low and high are NaN for a single window.

    how  bootstrap: expanded percentiles of resampled windows. t: Student's interval, with fewer than 6 windows, where
         resampling cannot reach the level. none: a single window.
    """

    mean: float
    low: float
    high: float
    n: int
    how: Literal["bootstrap", "t", "none"]

    @property
    def sure(self) -> bool:
        """Whether the interval does not contain 0: the difference is more than noise between windows."""
        return self.low > 0 or self.high < 0

    @property
    def ratio(self) -> tuple[float, float, float]:
        """A difference of nll as the ratio of perplexities: exp of mean, low and high."""
        return _exp(self.mean), _exp(self.low), _exp(self.high)


def interval(values: Sequence[float]) -> Interval:
    """The interval of a mean over windows, such as a run's nll or KL."""
    return intervals([values])[0]


def intervals(rows: ArrayLike) -> list[Interval]:
    """The interval of each row's mean; rows (M, n) have a value, or a difference of two runs, for each of n windows.

    All rows are resampled by the same 10,000 draws of windows.

    Raises: ValueError if there is no window.
    """
    values = np.atleast_2d(np.asarray(rows, dtype=np.float64))
    count = values.shape[1]
    if count == 0:
        raise ValueError("an interval of 0 windows does not exist; expected 1 or more")
    means = np.array([math.fsum(row) / count for row in values.tolist()])
    if count == 1:
        return [Interval(mean, math.nan, math.nan, 1, "none") for mean in means.tolist()]
    deviations = values - means[:, None]
    few = count < FEWEST
    low, high = _student(deviations) if few else _bootstrap(deviations)
    bounds = zip(means.tolist(), (means + low).tolist(), (means + high).tolist(), strict=True)
    return [Interval(mean, below, above, count, "t" if few else "bootstrap") for mean, below, above in bounds]


def difference(run: Record, base: Record, of: Windows = "window_nll") -> Interval:
    """The interval of the mean of run - base over the windows of both.

    Raises: ValueError if the two did not score the same tokens with the same model, or a window is missing.
    """
    _check(run, base, of)
    return interval([a - b for a, b in zip(windows(run, of), windows(base, of), strict=True)])


def windows(run: Record, of: Windows = "window_nll") -> list[float]:
    """A run's value for each window; empty for a failed run, and for one that did not measure it."""
    values = getattr(run, of) if run.status == "ok" else []
    numeric = isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)
    return [float(value) for value in values] if numeric else []


def scored(run: Record) -> tuple[object, object, object]:
    """What two runs must share for their windows to be the same: model, tokens, length."""
    text = run.data.evaluation or Text()
    return run.model.fingerprint, text.tokens_sha256, text.seq_len


def t_quantile(tail: float, freedom: int) -> float:
    """The value that Student's t exceeds with probability `tail` below a half, at `freedom` degrees of freedom.

    Bisection of a finite series in the angle atan(t / sqrt(freedom)): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _inside(middle, freedom) < 1 - 2 * tail else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)); every term is positive, so nothing cancels."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1, (freedom - odd) // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    inner = math.sin(angle) * total
    return 2 / math.pi * (angle + inner) if odd else inner


@lru_cache(maxsize=64)
def _t(count: int) -> float:
    return t_quantile((1 - LEVEL) / 2, count - 1)


def _student(deviations: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of Student's interval, relative to the mean, of deviations (M, n) from it."""
    count = deviations.shape[1]
    half = _t(count) * np.sqrt(np.square(deviations).sum(1) / (count - 1) / count)
    return -half, half


def _bootstrap(deviations: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of the expanded percentile interval, relative to the mean, of deviations (M, n) from it."""
    count = deviations.shape[1]
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _t(count))
    slabs = np.array_split(_draws(count), _SLABS, axis=1)
    means = np.concatenate([deviations.astype(np.float32) @ slab.astype(np.float32) for slab in slabs], axis=1) / count
    low, high = np.quantile(means, (tail, 1 - tail), axis=1)
    return low.astype(np.float64), high.astype(np.float64)


@lru_cache(maxsize=4)
def _draws(count: int) -> NDArray[np.uint8]:
    """How often each resample contains each window, (n, resamples); the same in every call."""
    random = np.random.default_rng(_SEED)
    slabs = [
        random.multinomial(count, [1 / count] * count, RESAMPLES // _SLABS).astype(np.uint8) for _ in range(_SLABS)
    ]
    return np.concatenate(slabs).T


def _check(run: Record, base: Record, of: Windows) -> None:
    for name, ours, theirs in zip(("fingerprint", "tokens_sha256", "seq_len"), scored(run), scored(base), strict=True):
        if ours is None or ours != theirs:
            raise ValueError(
                f"{name}={ours} of run {run.run_id} and {theirs} of run {base.run_id} cannot be compared; "
                "expected runs of one model on the same tokens"
            )
    counts = [len(windows(record, of)) for record in (run, base)]
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(
            f"{of} has {counts[0]} windows in run {run.run_id} and {counts[1]} in run {base.run_id}; "
            "expected as many in both, 1 or more: run the one without them again"
        )


def _exp(value: float) -> float:
    return math.exp(value) if not value > _LARGEST else math.inf
