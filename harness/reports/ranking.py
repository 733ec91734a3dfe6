"""Which differences between rows are more than noise: intervals of their figures, and ranks with ties."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from harness.records import Record
from harness.reports.intervals import difference, interval, intervals, scored, windows

Columns = dict[str, list[float | str | None]]
Row = dict[str, float | str | None]


def columns(runs: Sequence[Record], baselines: Sequence[Record | None]) -> Columns:
    """The columns that windows give, one value for each of `runs` with its float baseline; NaN without windows.

    perplexity_low, _high        interval of the run's own perplexity, over windows of such a text
    perplexity_ratio_low, _high  of its ratio to the baseline, over the windows of both: far narrower
    kl_low, kl_high              of the mean divergence from the float model
    interval                     bootstrap or t, as `intervals` chose
    rank_low, rank_high          of the nll among runs of one model and text: 1 + the number of runs that are surely
                                 better, and the number of all but those that are surely worse
    """
    rows = [_row(*parts) for parts in zip(runs, baselines, ranks(runs), strict=True)]
    return {name: [row[name] for row in rows] for name in _row(Record(""), None, None)}


def ranks(runs: Sequence[Record]) -> list[tuple[int, int] | None]:
    """Best and worst rank that the paired intervals leave to each run; None with fewer than 2 windows.

    Each pair is judged at the level of one interval: among many rows, some ties are broken by chance.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        if len(windows(run)) > 1:
            groups[(*scored(run), len(windows(run)))].append(place)
    out: list[tuple[int, int] | None] = [None] * len(runs)
    for places in groups.values():
        for place, rank in zip(places, _ranks([windows(runs[place]) for place in places]), strict=True):
            out[place] = rank
    return out


def _ranks(nll: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    values, count = np.array(nll), len(nll)
    better, worse = [0] * count, [0] * count  # how many rows surely are
    for one in range(count - 1):
        for other, gap in enumerate(intervals(values[one] - values[one + 1 :]), one + 1):
            if gap.sure:
                winner, loser = (other, one) if gap.mean > 0 else (one, other)
                better[loser] += 1
                worse[winner] += 1
    return [(1 + above, count - below) for above, below in zip(better, worse, strict=True)]


def _row(run: Record, baseline: Record | None, rank: tuple[int, int] | None) -> Row:
    low, high = rank or (math.nan, math.nan)
    return _alone(run) | _compared(run, baseline) | {"rank_low": low, "rank_high": high}


def _alone(run: Record) -> Row:
    """Intervals of a run's own figures."""
    nll_windows, kl_windows = windows(run), windows(run, "window_kl")
    nll = interval(nll_windows) if nll_windows else None
    kl = interval(kl_windows) if kl_windows else None
    return {
        "perplexity_low": nll.ratio[1] if nll else math.nan,
        "perplexity_high": nll.ratio[2] if nll else math.nan,
        "kl_low": kl.low if kl else math.nan,
        "kl_high": kl.high if kl else math.nan,
        "interval": nll.how if nll else None,
    }


def _compared(run: Record, baseline: Record | None) -> Row:
    """The interval of a run's ratio to its float baseline."""
    paired = baseline is not None and 0 < len(windows(run)) == len(windows(baseline))
    _, low, high = difference(run, baseline).ratio if baseline and paired else (math.nan, math.nan, math.nan)
    return {"perplexity_ratio_low": low, "perplexity_ratio_high": high}
