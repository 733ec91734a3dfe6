"""Two records of the same run by different code: which results differ, and the record to keep if none does."""

from __future__ import annotations

from dataclasses import replace

from harness.records import Record
from harness.records.metrics import repeats


def moved(before: Record, now: Record) -> list[str]:
    """The results that differ between two records, for a message: metrics with both values, and analyses.

    Metrics that differ in every run, such as times, are not compared.
    """
    names = [name for name in {**before.metrics, **now.metrics} if repeats(name)]
    changes = [
        f"{name} {_figure(before.metrics.get(name))} -> {_figure(now.metrics.get(name))}"
        for name in names
        if before.metrics.get(name) != now.metrics.get(name)
    ]
    for name in ("window_nll", "window_kl", "analysis"):
        if getattr(before, name) != getattr(now, name):
            changes.append(name)
    return changes


def stamped(before: Record, now: Record) -> Record:
    """The earlier record with its timings, confirmed by the code and the commit of the newer record."""
    return replace(before, code=now.code, confirmed=now.environment.commit)


def _figure(value: float | None) -> str:
    return "absent" if value is None else f"{value:.6g}"
