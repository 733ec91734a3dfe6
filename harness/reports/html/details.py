"""What a record says beyond its figures: the sections behind a row, and what differs between records."""

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
    """All that the page shows of one run."""

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
    known = {name: value for name, value in seconds.items() if number(value)} if isinstance(seconds, dict) else {}
    longest = max(known.values(), default=0) or 1
    return [(str(name), f"{value:.1f} s", 100 * value / longest) for name, value in known.items()]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested sections as (dotted key, text), floats in six digits; a list is one leaf, None is none."""
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
    """Records sorted by one of their fields: what all have in common, and what tells the classes apart."""

    common: Pairs
    keys: list[str]
    rows: list[tuple[int, int, list[str]]]  # number of the class, how many runs, their values of `keys`
    of: dict[str, int]  # run_id -> number of its class


def classes(records: Sequence[Record], name: str) -> Classes:
    """Classes of equal values of a field such as `environment`, numbered from 1 in order of appearance."""
    leaves = {record.run_id: dict(flat(getattr(record, name))) for record in records}
    every = list(dict.fromkeys(key for found in leaves.values() for key in found))
    differs = [key for key in every if len({found.get(key) for found in leaves.values()}) > 1]
    numbers: dict[tuple[str, ...], int] = {}
    of = {}
    for run, found in leaves.items():
        values = tuple(found.get(key, "absent") for key in differs)
        of[run] = numbers.setdefault(values, len(numbers) + 1)
    members = list(of.values())
    rows = [(i, members.count(i), list(values)) for values, i in numbers.items()]
    first = next(iter(leaves.values()), {})
    return Classes([(key, first[key]) for key in every if key not in differs], differs, rows, of)


@dataclass(frozen=True)
class Sweep:
    """The summary of a sweep: how long it took, and the share of that which was its own work."""

    name: str
    wall: str
    own_share: str
    stages: list[tuple[str, str, float]]


def sweeps(folder: Path) -> list[Sweep]:
    """Summaries in `sweeps/` of a folder of records; a file that is none is left out."""
    found = []
    for path, loaded in sweep.summaries(folder).items():
        share = loaded["own_share"]
        shown = f"{100 * share:.2g} %" if number(share) else "-"
        found.append(Sweep(path.stem, f"{loaded['wall_s']:.0f} s", shown, bars(loaded["stages"])))
    return found
