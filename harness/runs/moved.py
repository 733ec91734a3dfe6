"""Two records of the same run, by different code: what moved, and the record that is kept where nothing did."""

from __future__ import annotations

from dataclasses import replace

from harness.records import Record
from harness.records.metrics import repeats


def moved(before: Record, now: Record) -> list[str]:
    """What differs between the results of two runs: metrics, with both values, and analyses. Timings do not count."""
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
    """The earlier record, its timings too, confirmed by the code of the newer one."""
    return replace(before, code=now.code, confirmed=now.environment.commit)


def _figure(value: float | None) -> str:
    return "absent" if value is None else f"{value:.6g}"
