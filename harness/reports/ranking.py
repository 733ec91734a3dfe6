"""Which differences between rows are more than noise: the intervals of their figures, and ranks with their ties."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from harness.records.store import Record
from harness.reports.intervals import difference, interval, intervals, scored, windows

Columns = dict[str, list[float | str | None]]


def columns(runs: Sequence[Record], bases: Sequence[Record | None]) -> Columns:
    """The columns that windows give, one value for each of `runs` with its float baseline; NaN where they give none.

    perplexity_low, _high        of the run's own perplexity, over windows of such text
    perplexity_ratio_low, _high  of its ratio to the baseline, over the windows of both: by far the narrower
    kl_low, kl_high              of the mean divergence from the float model
    interval                     bootstrap or t, as `uncertainty` chose
    rank_low, rank_high          of the nll among runs of one model and text: 1 + those that are surely better, and all
                                 but those that are surely worse
    """
    found: Columns = defaultdict(list)
    for run, base, rank in zip(runs, bases, ranks(runs), strict=True):
        for name, value in (_own(run) | _against(run, base)).items():
            found[name].append(value)
        found["rank_low"].append(rank[0] if rank else math.nan)
        found["rank_high"].append(rank[1] if rank else math.nan)
    return dict(found)


def ranks(runs: Sequence[Record]) -> list[tuple[int, int] | None]:
    """Best and worst rank that the paired intervals leave to each run; None without 2 windows.

    Each pair is judged at the level of one interval: among many rows, some ties are broken by chance.
    """
    groups: dict[object, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        if len(windows(run)) > 1:
            groups[(*scored(run), len(windows(run)))].append(place)
    found: list[tuple[int, int] | None] = [None] * len(runs)
    for places in groups.values():
        for place, rank in zip(places, _ranks([windows(runs[place]) for place in places]), strict=True):
            found[place] = rank
    return found


def _ranks(nll: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    values, count = np.array(nll), len(nll)
    better, worse = [0] * count, [0] * count  # how many rows surely are
    for one in range(count - 1):
        for other, apart in enumerate(intervals(values[one] - values[one + 1 :]), one + 1):
            if apart.sure:
                winner, loser = (other, one) if apart.mean > 0 else (one, other)
                better[loser] += 1
                worse[winner] += 1
    return [(1 + above, count - below) for above, below in zip(better, worse, strict=True)]


def _own(run: Record) -> dict[str, float | str | None]:
    nll, kl = windows(run), windows(run, "window_kl")
    own = interval(nll) if nll else None
    apart = interval(kl) if kl else None
    return {
        "perplexity_low": own.ratio[1] if own else math.nan,
        "perplexity_high": own.ratio[2] if own else math.nan,
        "kl_low": apart.low if apart else math.nan,
        "kl_high": apart.high if apart else math.nan,
        "interval": own.how if own else None,
    }


def _against(run: Record, base: Record | None) -> dict[str, float | str | None]:
    paired = base is not None and 0 < len(windows(run)) == len(windows(base))
    _, low, high = difference(run, base).ratio if base and paired else (math.nan, math.nan, math.nan)
    return {"perplexity_ratio_low": low, "perplexity_ratio_high": high}
