"""A frame as text: columns that name the rows, metrics as "value (ratio)", and one line on what all rows share."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from harness.records.folder import Columns
from harness.records.metrics import Metric
from harness.reports.describe import EAGER, SETTING
from harness.reports.frame import measured

RANK = "rank"
STALE = "†"
STALE_NOTE = f"{STALE} result of other code than today's: run it again, or `make reproduce` confirms it"
# Of the table of quality: heading of an interval's column, and the figure of the frame whose ends it shows, by metric.
_INTERVALS = {"perplexity": ("95% of ratio", "perplexity_ratio", ".3f"), "kl": ("95% of KL", "kl", ".3g")}
_ALWAYS = ("method", "scheme", "bits")
_NAMES = ("model", "data", "windows", *SETTING, "device", "processor", "seed")
# In the short table, these columns are shown only if other columns do not tell two rows apart.
_SPARE = ("execution", "calibration", "windows", "device", "processor", "seed")


def display(frame: pd.DataFrame, columns: Columns = "short") -> pd.DataFrame:
    """The table for people: text cells, without the columns that tell nothing.

    The short table has the metrics that the registry marks for it, and as few naming columns as tell its rows apart.
    That of quality has those of its metrics that are no peaks and no times, with intervals over windows and ranks.
    """
    out = names(frame) if columns == "all" else _short_names(frame)
    if "seeds" in frame:
        out["seeds"] = [text(value) for value in frame["seeds"]]
    for metric in shown_metrics(frame, columns):
        out[heading(metric, columns)] = [_figure(row, metric, columns) for _, row in frame.iterrows()]
        if columns == "quality" and metric.name in _INTERVALS:
            title, name, digits = _INTERVALS[metric.name]
            out[title] = [_ends(row, name, digits) for _, row in frame.iterrows()]
        if metric.name == "perplexity" and columns != "short" and frame["rank_low"].notna().any():
            out[RANK] = [_rank(row) for _, row in frame.iterrows()]
    if (frame["status"] != "ok").any():
        out["status"] = frame["status"]
    return _marked(out, frame)


def shown_metrics(frame: pd.DataFrame, columns: Columns) -> list[Metric]:
    """The metrics that the table of a frame has as columns: perplexity even if no row has it."""
    metrics = measured(frame, always=("perplexity",))
    if columns == "all":
        return metrics
    short = [metric for metric in metrics if metric.short in ("value", "both") or _has_ratio(frame, metric)]
    return short if columns == "short" else [metric for metric in short if metric.kind in ("exact", "result")]


def _has_ratio(frame: pd.DataFrame, metric: Metric) -> bool:
    return metric.short == "ratio" and bool(frame[metric.ratio].notna().any())


def figures(frame: pd.DataFrame, columns: Columns) -> list[str]:
    """The headings of the columns that are numbers, but for the rank."""
    out = []
    for metric in shown_metrics(frame, columns):
        out.append(heading(metric, columns))
        if columns == "quality" and metric.name in _INTERVALS:
            out.append(_INTERVALS[metric.name][0])
    return out


def heading(metric: Metric, columns: Columns) -> str:
    """The heading of a metric's column; without the unit where it shows the ratio alone."""
    return metric.title if columns != "all" and metric.short == "ratio" else metric.heading or metric.name


def names(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that tell rows apart, as text; columns with one value in all rows are left out."""
    out = pd.DataFrame(index=frame.index)
    for name in _NAMES:
        if name in (*_ALWAYS, "execution") or frame[name].nunique() > 1:
            out[name] = [text(value) for value in frame[name]]
    kernels = zip(out["execution"], frame["kernel"], strict=True)
    out["execution"] = [mode if pd.isna(kernel) else f"{mode}: {kernel}" for mode, kernel in kernels]
    return out


def _short_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The naming columns of the short table: the spare ones only where rows are alike without them."""
    out = names(frame)
    chosen = [name for name in out if name not in _SPARE]
    for name in _SPARE:
        alike = out[chosen].duplicated(keep=False)
        if name in out and out.loc[alike].groupby(chosen)[name].nunique().gt(1).any():
            chosen.append(name)
    return out[[name for name in out if name in chosen]].copy()


def _marked(out: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """The table with the sign of stale rows at the end of their first cell."""
    first = out.columns[0]
    out[first] = [f"{cell} {STALE}" if old else cell for cell, old in zip(out[first], frame["stale"], strict=True)]
    return out


def shared(frame: pd.DataFrame, columns: Columns) -> str:
    """The values that all rows have, and what the signs of the table mean, in one line."""
    marks = ["with x: ratio to the float baseline (times: how many times as fast)"]
    if any(_is_noise(row) for _, row in frame.iterrows()):
        marks.append("≈: its 95% interval over windows contains 1")
    if columns == "quality":
        marks.append("95%: interval over windows")
    if columns != "short" and frame["rank_low"].notna().any():
        marks.append("rank: among rows on the same windows, 2-4 where their intervals leave 2 to 4 open")
    if "seeds" in frame:
        marks.append("±: standard deviation over seeds")
    return "; ".join([part for part in (in_common(frame),) if part] + marks)


def in_common(frame: pd.DataFrame) -> str:
    """The values that all rows have."""
    parts = []
    for name in ("model", "data", "protocol", "windows", "calibration", "dtype", "device", "processor"):
        values = frame[name].dropna().unique()
        if len(values) == 1:
            parts.append(f"{name} {text(values[0])}")
    if list(frame["runtime"].unique()) not in ([], [EAGER]) and frame["runtime"].nunique() == 1:
        parts.append(f"runtime {frame['runtime'].iloc[0]}")
    return ", ".join(parts)


def notes(frame: pd.DataFrame) -> list[str]:
    """A line for each failed run, and one that explains the sign of stale rows if there are any."""
    failed = frame[frame["status"] != "ok"]
    lines = [f"{row['status']} {row['run_id']}: {row['error']}" for _, row in failed.iterrows()]
    return lines + ([STALE_NOTE] if frame["stale"].any() else []) + (["no rows"] if frame.empty else [])


def text(value: Any) -> str:
    """A cell: whole numbers without a point, a dash for a missing value."""
    if value is None or pd.isna(value):
        return "-"
    return str(int(value)) if isinstance(value, float) else str(value)


def number(value: float, digits: str) -> str:
    """A figure in the format `digits`, or in three significant digits where that would be long."""
    return format(value, digits if value < 1e4 else ".3g")


def times(ratio: float) -> str:
    """A ratio with its x."""
    return f"{ratio:{'.2f' if ratio < 1e3 else '.2g'}}x"


def _figure(row: pd.Series[Any], metric: Metric, columns: Columns) -> str:
    parts = "both" if columns == "all" else metric.short
    ratio = row[metric.ratio] if metric.ratio else math.nan
    if parts == "ratio":
        return "-" if pd.isna(ratio) else times(ratio)
    if pd.isna(row[metric.name]):
        return "-"
    value, deviation = number(row[metric.name], metric.digits), row.get(f"{metric.name}_sd", 0.0)
    if deviation > 0:
        value += f" ± {number(deviation, metric.digits)}"
    if parts == "value" or pd.isna(ratio):
        return value
    return f"{value} ({'≈' if metric.name == 'perplexity' and _is_noise(row) else ''}{times(ratio)})"


def _is_noise(row: pd.Series[Any]) -> bool:
    """Whether the ratio to the float baseline may be 1; equal values in every window are no noise."""
    low, high = row["perplexity_ratio_low"], row["perplexity_ratio_high"]
    return bool(low <= 1 <= high and low < high)


def _ends(row: pd.Series[Any], name: str, digits: str) -> str:
    """The ends of an interval; a dash without windows, or where both are equal: a model against itself."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{number(low, digits)}-{number(high, digits)}" if low < high else "-"


def _rank(row: pd.Series[Any]) -> str:
    low, high = row["rank_low"], row["rank_high"]
    if pd.isna(low):
        return "-"
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"
