"""The table of all runs: cells with the text that is read, and the value by which they sort and are filtered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.records.metrics import Metric
from harness.reports.cells import STALE, number
from harness.reports.frame import measured
from harness.reports.html.pareto import TIMES

# Columns that describe a run: those that are always shown, and those shown where rows differ, before and after metrics.
ALWAYS = ("method", "scheme", "bits")
FIRST = "perplexity"  # the metric that follows them, so that a phone shows it
BEFORE = ("options", "kv", "dtype", "execution", "runtime", "batch", "prompt")
AFTER = ("calibration", "model", "data", "windows", "device", "seed", "protocol_class", "environment_class")


@dataclass(frozen=True)
class Column:
    """A column: `unit` stands below the heading; figures sort and filter as numbers, by default with `sign`."""

    heading: str
    unit: str
    figure: bool
    sign: str = "<"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, the text below it, and the value it sorts by; None for a metric that was not measured."""

    text: str
    below: str = ""
    order: float | str | None = None


@dataclass(frozen=True)
class Row:
    """A run of the table."""

    run_id: str
    method: str
    failed: bool
    cells: list[Cell]


def table(frame: pd.DataFrame) -> tuple[list[Column], list[Row]]:
    """The columns that tell something, and a row for each run."""
    before = _differing(frame, BEFORE)
    after = [*_differing(frame, AFTER), *(["status"] if (frame["status"] != "ok").any() else [])]
    metrics = measured(frame)
    first = [metric for metric in metrics if metric.name == FIRST]
    others = [metric for metric in metrics if metric.name != FIRST]
    parts: list[tuple[Sequence[str], Sequence[Metric]]] = [(ALWAYS, first), (before, others), (after, ())]
    columns = [
        column for names, figures in parts for column in (*map(_naming_column, names), *map(_metric_column, figures))
    ]
    rows = []
    for _, row in frame.iterrows():
        cells = []
        for names, figures in parts:
            cells += [_naming_cell(row, name) for name in names]
            cells += [_metric_cell(row, metric) for metric in figures]
        rows.append(Row(row["run_id"], row["method"], row["status"] != "ok", cells))
    return columns, rows


def _differing(frame: pd.DataFrame, names: Sequence[str]) -> list[str]:
    return [name for name in names if frame[name].nunique() > 1]


def _naming_column(name: str) -> Column:
    return Column(name.removesuffix("_class"), "", name in ("bits", "batch", "prompt", "windows", "seed"))


def _metric_column(metric: Metric) -> Column:
    return Column(metric.title, metric.unit, True, "<" if metric.better == "lower" else ">")


def _naming_cell(row: pd.Series[Any], name: str) -> Cell:
    value = row[name]
    if value is None or pd.isna(value) or value == "":
        return Cell("", order="")
    if isinstance(value, float):
        return Cell(f"{value:g}", order=value)
    if name == "execution" and not pd.isna(row["kernel"]):
        return Cell(value, row["kernel"], f"{value} {row['kernel']}")
    sign = f" {STALE}" if name == ALWAYS[0] and row["stale"] else ""
    return Cell(f"{value}{sign}", order=f"{value}{sign}")


def _metric_cell(row: pd.Series[Any], metric: Metric) -> Cell:
    value = row[metric.name]
    if pd.isna(value):
        return Cell("-")
    text, ratio = number(value, metric.digits), row.get(metric.ratio or "")
    if ratio is None or pd.isna(ratio):
        return Cell(text, order=float(value))
    return Cell(text, f"{ratio:{'.2f' if ratio < 1e3 else '.2g'}}{TIMES}", float(value))
