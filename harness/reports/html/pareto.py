"""The data of the Pareto plots: which runs may be compared, their points, and the points that no other run beats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from harness.records.metrics import METRICS, Metric
from harness.reports.cells import STALE
from harness.reports.frame import measured

Point = dict[str, Any]

# Rows of one group were measured on the same model, text, windows and device: their figures can be compared.
COMPARABLE = ("model", "fingerprint", "data", "tokens_sha256", "seq_len", "protocol", "windows", "device")
REACH = 5  # how many times the float perplexity a plot reaches; points beyond are drawn at its edge and named
TIMES = "\u00d7"
FLOAT_ROOM = 1.4  # float models that cost more than this times the dearest other run are lines and no points
STACKED = 0.95  # points at an edge that would hide each other are drawn this far apart
# Columns that may tell two runs apart that agree in method, scheme, bits and options.
_DISTINCTIVE = (
    *("model", "data", "dtype", "execution", "kernel", "runtime", "batch", "prompt", "calibration", "device", "seed"),
    "run_id",
)


@dataclass(frozen=True)
class Axis:
    """A metric on an axis of a plot: its title, and the columns of its interval.

    reach  how many times the float model's value the axis reaches; None for all the way
    """

    name: str
    title: str
    low: str
    high: str
    reach: float | None = None


def _axis(metric: Metric) -> Axis:
    """The axis of a metric. Times have percentiles, losses an interval over windows, counted costs neither."""
    title = f"{metric.long}, {metric.unit}" if metric.unit else metric.long
    low, high = f"{metric.name}_low", f"{metric.name}_high"
    if metric.kind == "time":
        low, high = (metric.name.replace("p50", share) for share in ("p10", "p90"))
    return Axis(metric.name, title, low, high, REACH if metric.axis == "loss" and metric.ratio else None)


COSTS = tuple(_axis(metric) for metric in METRICS if metric.axis == "cost")
LOSSES = tuple(_axis(metric) for metric in METRICS if metric.axis == "loss")


@dataclass
class Plot:
    """Points of one loss against one cost.

    floats  float models that cost more than its axis shows: lines at their loss
    beyond  the runs drawn at its edge, each with the figure that is beyond it
    zeros   the runs that are left out, since a figure is zero
    """

    cost: Axis
    loss: Axis
    points: list[Point]
    floats: list[Point] = field(default_factory=list)
    beyond: list[tuple[str, str]] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)


def groups(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Finished rows that can be compared, under a heading; the largest group first."""
    finished = frame[frame["status"] == "ok"]
    parts = [part for _, part in finished.groupby(list(COMPARABLE), dropna=False, sort=False)]
    for part in sorted(parts, key=len, reverse=True):
        yield heading(part.iloc[0]), part


def heading(row: pd.Series[Any]) -> str:
    """The values that the rows of a group share, in a few words."""
    windows = "" if pd.isna(row["windows"]) else f"{int(row['windows'])} windows of {int(row['seq_len'])} tokens"
    parts = (row["model"], row["data"], windows, row["device"])
    return " · ".join(str(part) for part in parts if part and not pd.isna(part))


def labels(frame: pd.DataFrame) -> dict[str, str]:
    """A name for each run_id: method, scheme, bits, options, and further columns where two runs agree in these.

    Names of stale rows end with the sign of such rows.
    """
    named = {index: name_of(row) for index, row in frame.iterrows()}
    for column in _DISTINCTIVE:
        names = pd.Series(named)
        for name, same in names[names.duplicated(keep=False)].groupby(names):
            values = frame.loc[same.index, column]
            if values.nunique(dropna=False) > 1:
                named |= {index: f"{name} {'-' if pd.isna(value) else value}" for index, value in values.items()}
    return {
        row["run_id"]: f"{named[index]} {STALE}" if row["stale"] else named[index] for index, row in frame.iterrows()
    }


def plots(frame: pd.DataFrame, names: dict[str, str]) -> Iterator[Plot]:
    """Each loss against each cost, for the rows of one group; none with fewer than two points."""
    names_measured = {metric.name for metric in measured(frame)}
    for loss in LOSSES:
        for cost in COSTS:
            if {loss.name, cost.name} <= names_measured:
                candidate = plot(frame, cost, loss, names)
                if len(candidate.points) + len(candidate.floats) > 1:
                    yield candidate


def plot(frame: pd.DataFrame, cost: Axis, loss: Axis, names: dict[str, str]) -> Plot:
    """The points of rows with both figures. A logarithmic axis has no zero: rows with zeros are named instead."""
    complete = frame.dropna(subset=[cost.name, loss.name])
    rows = complete[(complete[cost.name] > 0) & (complete[loss.name] > 0)]
    points = [_point(row, cost, loss, names) for _, row in rows.iterrows()]
    lowest = min((point["loss"] for point in points if point["method"] == "none"), default=None)
    points, floats = _split(points, cost)
    for point, best in zip(points, front([(point["cost"], point["loss"]) for point in points]), strict=True):
        point["front"] = best
    beyond = _keep_low(points, loss, lowest)
    zeros = [names[row["run_id"]] for _, row in complete.drop(rows.index).iterrows()]
    return Plot(cost, loss, points, floats, beyond, zeros)


def named(beyond: Sequence[tuple[str, str]]) -> list[str]:
    """Each run that is beyond the edge of a plot, with all its figures that are."""
    figures: dict[str, list[str]] = {}
    for label, shown in dict.fromkeys(beyond):
        figures.setdefault(label, []).append(shown)
    return [f"{label}: {', '.join(shown)}" for label, shown in figures.items()]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, loss) is on the Pareto front: no other point is as good in both values and better in one."""
    return [not any(a <= cost and b <= loss and (a, b) != (cost, loss) for a, b in points) for cost, loss in points]


def name_of(row: pd.Series[Any]) -> str:
    """Method, scheme, bits, options and KV cache of a run."""
    kv = "" if row["kv"] == "none" else row["kv"]
    if row["method"] == "none":
        changes = " ".join(part for part in (row["options"], kv) if part)
        return f"float {row['dtype']} {changes}" if changes else f"float baseline {row['dtype']}"
    bits = "" if pd.isna(row["bits"]) else f"{row['bits']:g} bits"
    parts = (kind(row), bits, row["options"], kv)
    return " ".join(str(part) for part in parts if part and not pd.isna(part))


def kind(row: pd.Series[Any]) -> str:
    """Method and scheme; the method alone where it has its own format."""
    own = pd.isna(row["scheme"]) or row["scheme"] in ("none", row["method"])
    return str(row["method"]) if own else f"{row['method']} {row['scheme']}"


def _short(row: pd.Series[Any]) -> str:
    if row["method"] == "none":
        return str(row["options"] or (row["dtype"] if row["kv"] == "none" else row["kv"].split()[0]))
    return str(row["method"]) if pd.isna(row["bits"]) else f"{row['method']} {row['bits']:g}"


def _point(row: pd.Series[Any], cost: Axis, loss: Axis, names: dict[str, str]) -> Point:
    point: Point = {"run": row["run_id"], "label": names[row["run_id"]], "short": _short(row), "method": row["method"]}
    point |= {"simulated": row["execution"] == "simulated", "shape": "diamond" if row["method"] == "none" else "circle"}
    point |= {"cost": float(row[cost.name]), "loss": float(row[loss.name])}
    point |= {"across": point["cost"], "height": point["loss"]}
    point |= {"cost_text": text(row, cost), "loss_text": text(row, loss)}
    for axis, kind in ((loss, "loss"), (cost, "cost")):
        if interval := _interval(row, axis):
            point |= {f"{kind}_low": interval[0], f"{kind}_high": interval[1]}
    return point


def _keep_low(points: list[Point], loss: Axis, lowest: float | None) -> list[tuple[str, str]]:
    """Draw points beyond the reach of a loss at the top edge; `lowest` is the smallest loss of a float model.

    Returns: their names and figures.
    """
    if loss.reach is None or not points:
        return []
    limit = loss.reach * (lowest or min(point["loss"] for point in points))
    beyond = sorted((point for point in points if point["loss"] > limit), key=lambda point: point["cost"])
    for point in points:
        if "loss_high" in point:
            point["loss_high"] = min(point["loss_high"], limit)
    for previous, point in zip([None, *beyond], beyond, strict=False):
        crowded = previous is not None and point["cost"] < 1.03 * previous["cost"]
        point |= {"height": previous["height"] * STACKED if previous and crowded else limit, "shape": "triangle-up"}
        point.pop("loss_low", None)
        point.pop("loss_high", None)
    return [(point["label"], f"{loss.name} {point['loss_text']}") for point in beyond]


def _split(points: list[Point], cost: Axis) -> tuple[list[Point], list[Point]]:
    """The points, without float models that would press all others into a corner; and these."""
    others = [point["cost"] for point in points if point["method"] != "none"]
    if not others or _is_time(cost):
        return points, []
    limit = FLOAT_ROOM * max(others)
    far = [point for point in points if point["method"] == "none" and point["cost"] > limit]
    return [point for point in points if point not in far], far


def cost_of(plot: Plot, point: Point) -> str:
    """The cost of a point in words, such as "bits per weight 32"."""
    return f"{plot.cost.title.partition(',')[0]} {point['cost']:.4g}"


def _interval(row: pd.Series[Any], axis: Axis) -> tuple[float, float] | None:
    low, high = row.get(axis.low), row.get(axis.high)
    if low is None or high is None or pd.isna(low) or pd.isna(high) or low <= 0:
        return None
    return float(low), float(high)


def text(row: pd.Series[Any], axis: Axis) -> str:
    """A figure with its interval and its ratio to float, as the tooltip of a point shows it."""
    interval, ratio = _interval(row, axis), row.get(f"{axis.name}_ratio")
    shown = figure(row[axis.name])
    if interval:
        shown += f", {figure(interval[0])} to {figure(interval[1])}"
    if ratio is None or pd.isna(ratio):  # as of times, whose speedups are in the table
        return shown
    return f"{shown} ({format(ratio, '.3g' if ratio < 1e3 else ',.0f')}{TIMES} float)"


def _is_time(axis: Axis) -> bool:
    return axis.low.endswith("p10")


def figure(value: float) -> str:
    """A figure in four digits, without an exponent up to ten million."""
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}" if value < 1e7 else f"{value:.3g}"
