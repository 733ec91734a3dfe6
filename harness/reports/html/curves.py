"""Curves of speed: the runs of a latency sweep by the number of sequences, and by the tokens that each has read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.reports.describe import TIMED
from harness.reports.html.pareto import name_of

# The column of the horizontal axis -> its title, and how the other column is named in the title of a plot.
_AXES = {"batch": ("sequences at once", "a batch of {}"), "prompt": ("tokens of the prompt", "prompts of {} tokens")}
_SPEEDS = {"decode": "decode_ms_p50", "prefill": "prefill_ms_p50"}
# Quantized rows that differ in these have a line each; the names of float rows have their dtype.
_LINE = ("dtype", "execution", "runtime")


@dataclass(frozen=True)
class Curve:
    """Points {run, line, across, speed} of one plot; `axis` is the title of its horizontal axis."""

    title: str
    axis: str
    points: list[dict[str, Any]]


def curves(frame: pd.DataFrame) -> Iterator[Curve]:
    """Tokens per second by each of batch and prompt with the other fixed, where a line has two values or more."""
    timed = frame.dropna(subset=list(TIMED))
    lines = _lines(timed)
    for across, fixed in (TIMED, TIMED[::-1]):
        for value, part in timed.groupby(fixed):
            for kind, column in _SPEEDS.items():
                points = [point for _, row in part.iterrows() if (point := _point(row, across, kind, column, lines))]
                if curve := _several(points):
                    axis, _ = _AXES[across]
                    yield Curve(f"{kind}, {_AXES[fixed][1].format(f'{value:g}')}", axis, curve)


def _lines(frame: pd.DataFrame) -> dict[str, str]:
    """The line of each run_id: its name, and what tells it from another line."""
    quantized = frame[frame["method"] != "none"]
    differing = [column for column in _LINE if quantized[column].nunique() > 1]
    lines = {row["run_id"]: name_of(row) for _, row in frame.iterrows()}
    for _, row in quantized.iterrows():
        lines[row["run_id"]] = " ".join([name_of(row), *(str(row[column]) for column in differing)])
    return lines


def _point(row: pd.Series[Any], across: str, kind: str, column: str, lines: dict[str, str]) -> dict[str, Any] | None:
    if pd.isna(row[column]):
        return None
    tokens = row["batch"] * (row["prompt"] if kind == "prefill" else 1)
    speed = 1000 * float(tokens) / float(row[column])
    return {"run": row["run_id"], "line": lines[row["run_id"]], "across": int(row[across]), "speed": speed}


def _several(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of lines with more than one value of the horizontal axis."""
    values: dict[str, set[int]] = {}
    for point in points:
        values.setdefault(point["line"], set()).add(point["across"])
    return [point for point in points if len(values[point["line"]]) > 1]
