"""The contents of records beyond their figures: the sections behind a row, and the differences between records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeGuard

from harness.records import Record, sweep

Pairs = list[tuple[str, str]]

# Sections of a run's details: title, the record's field.
SECTIONS = (
    ("Options", "options"),
    ("Metrics", "metrics"),
    ("Execution", "execution"),
    ("Protocol and data", "data"),
    ("Model", "model"),
    ("Environment", "environment"),
    ("Configuration", "config"),
)


@dataclass(frozen=True)
class Details:
    """Everything that the page shows about one run."""

    run_id: str
    label: str
    status: str
    error: str
    warnings: list[str]
    stages: list[tuple[str, str, float]]  # name, seconds, share of the longest
    sections: list[tuple[str, Pairs]]


def details(record: Record, label: str) -> Details:
    """The details of a run, under its label."""
    sections = [(title, list(flat(getattr(record, name)))) for title, name in SECTIONS]
    return Details(
        run_id=record.run_id,
        label=label,
        status=record.status,
        error=record.error or "",
        warnings=[str(warning) for warning in record.warnings or ()],
        stages=bars(record.stages),
        sections=[(title, pairs) for title, pairs in sections if pairs],
    )


def bars(seconds: Any) -> list[tuple[str, str, float]]:
    """Seconds of stages as (name, text, percent of the longest)."""
    numbers = {name: value for name, value in seconds.items() if number(value)} if isinstance(seconds, dict) else {}
    longest = max(numbers.values(), default=0) or 1
    return [(str(name), f"{value:.1f} s", 100 * value / longest) for name, value in numbers.items()]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested sections as (dotted key, text), floats in six digits; lists are leaves, None is skipped."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {name: inner for name, inner in asdict(value).items() if inner is not None}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        shown = f"{value:.6g}" if isinstance(value, float) else value
        yield prefix, shown if isinstance(shown, str) else json.dumps(shown, default=str)


def number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Classes:
    """Records classed by one of their fields: the values that all share, and those in which the classes differ."""

    common: Pairs
    keys: list[str]
    rows: list[tuple[int, int, list[str]]]  # number of the class, number of its runs, their values of `keys`
    of: dict[str, int]  # run_id -> number of its class


def classes(records: Sequence[Record], name: str) -> Classes:
    """Classes of equal values of a field such as `environment`, numbered from 1 in order of appearance."""
    leaves = {record.run_id: dict(flat(getattr(record, name))) for record in records}
    keys = list(dict.fromkeys(key for values in leaves.values() for key in values))
    differing = [key for key in keys if len({values.get(key) for values in leaves.values()}) > 1]
    numbers: dict[tuple[str, ...], int] = {}
    of = {}
    for run_id, values in leaves.items():
        differences = tuple(values.get(key, "absent") for key in differing)
        of[run_id] = numbers.setdefault(differences, len(numbers) + 1)
    members = list(of.values())
    rows = [(i, members.count(i), list(values)) for values, i in numbers.items()]
    first = next(iter(leaves.values()), {})
    return Classes([(key, first[key]) for key in keys if key not in differing], differing, rows, of)


@dataclass(frozen=True)
class Sweep:
    """The summary of a sweep: its duration, and the share of the harness's own work in it."""

    name: str
    wall: str
    own_share: str
    stages: list[tuple[str, str, float]]


def sweeps(folder: Path) -> list[Sweep]:
    """Summaries in `sweeps/` of a folder of records; a file that is no summary is left out."""
    out = []
    for path, summary in sweep.summaries(folder).items():
        share = summary["own_share"]
        shown = f"{100 * share:.2g} %" if number(share) else "-"
        out.append(Sweep(path.stem, f"{summary['wall_s']:.0f} s", shown, bars(summary["stages"])))
    return out
