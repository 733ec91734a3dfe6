"""Records as a pandas frame: a row for each run, metrics with ratios to the float baseline, intervals and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import pandas as pd

from harness.records import Record
from harness.records.metrics import METRICS, Metric
from harness.reports import ranking
from harness.reports.describe import DESCRIBED, DTYPES, describe
from harness.reports.names import told_apart

_NAMES = tuple(metric.name for metric in METRICS)
# Ratios that the frame computes; those of times are speedups, which runs measure in pairs.
_RATIOS = tuple(metric for metric in METRICS if metric.ratio is not None and metric.ratio not in _NAMES)
_SAME_BASELINE = ["fingerprint", "tokens_sha256", "seq_len", "protocol", "device", "baseline_dtype"]
_ORDER = [
    "model",
    "data",
    "seq_len",
    "quantized",
    "method",
    "scheme",
    "width",
    "options",
    "calibration",
    "kv",
    "precision",
    "batch",
    "prompt",
    "seed",
    "run_id",
]


def to_frame(records: Sequence[Record], others: Sequence[Record] = (), stale: Set[str] = frozenset()) -> pd.DataFrame:
    """One row for each of `records`, sorted; `others` may contain their float baselines and get no rows.

    `<metric>_ratio` is to the float baseline of the same model, text and device: the run of method none in the row's
    `baseline_dtype`; without that run there is no ratio. Intervals and ranks are described in `ranking`. `stale` has
    the ids of the runs that are results of other code than today's; the column `stale` is true in their rows.
    """
    by_id: dict[str, Record] = {}
    for record in told_apart((*records, *others)):
        by_id.setdefault(record.run_id, record)
    frame = _typed(pd.DataFrame([_row(record) for record in by_id.values()], columns=_columns(by_id.values())))
    baselines = _baselines(frame)
    for metric in _RATIOS:
        frame[metric.ratio] = frame[metric.name].to_numpy() / baselines[metric.name].to_numpy()
    frame["stale"] = pd.Series([is_stale(run_id, stale) for run_id in frame["run_id"]], frame.index, dtype=bool)
    baseline_ids = dict(zip(frame["run_id"], baselines["run_id"], strict=True))
    frame = frame[frame["run_id"].isin([record.run_id for record in records])]
    runs = [by_id[run_id] for run_id in frame["run_id"]]
    columns = ranking.columns(runs, [by_id.get(baseline_ids[run.run_id]) for run in runs])
    frame = frame.assign(**{name: pd.Series(values, index=frame.index) for name, values in columns.items()})
    return frame.loc[_order(frame)].reset_index(drop=True)


def is_stale(run_id: str, stale: Set[str]) -> bool:
    """Whether a run, or one of the runs of a mean over seeds, is among the ids `stale`."""
    return not stale.isdisjoint(run_id.split("+"))


def measured(frame: pd.DataFrame, always: Sequence[str] = ()) -> list[Metric]:
    """The metrics that a table of these rows has as columns: those that a row has, and those named `always`.

    A metric with a usual value is among them only if a row has another value.
    Sizes of KV caches are among them only if a row has a quantized cache: without one, every cache is the model's own.
    """
    quantized_caches = bool((frame["kv"] != "none").any())
    return [
        metric
        for metric in METRICS
        if metric.heading
        and (metric.name in always or frame[metric.name].notna().any())
        and (metric.usual is None or frame[metric.name].dropna().ne(metric.usual).any())
        and (quantized_caches or not _of_cache(metric))
    ]


def _of_cache(metric: Metric) -> bool:
    return metric.name.startswith("kv_")


def _row(record: Record) -> dict[str, Any]:
    return {**record.metrics, **describe(record), "error": record.error}


def _columns(records: Iterable[Record]) -> list[str]:
    """The usual columns; for means over seeds also the standard deviations and the number of seeds."""
    present = {name for record in records for name in record.metrics}
    deviations = [f"{name}_sd" for name in _NAMES if f"{name}_sd" in present]
    return [*DESCRIBED, *_NAMES, "error", *deviations, *(["seeds"] if "seeds" in present else [])]


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with float64 metrics and bits; values of failed runs that are no numbers become NaN."""
    for name in frame.columns.difference([*DESCRIBED, "error"]).union(["bits"]):
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype("float64")
    return frame


def _baselines(frame: pd.DataFrame) -> pd.DataFrame:
    """The float baseline of each row, a row of NaN if there is none."""
    plain = (frame["method"] == "none") & (frame["kv"] == "none") & (frame["options"] == "")
    floats = frame[plain & (frame["dtype"] == frame["baseline_dtype"])]
    return frame[_SAME_BASELINE].merge(floats.drop_duplicates(_SAME_BASELINE), on=_SAME_BASELINE, how="left")


def _order(frame: pd.DataFrame) -> pd.Index[Any]:
    keys = frame.assign(
        quantized=frame["method"] != "none",
        width=-frame["bits"].fillna(0),
        precision=frame["dtype"].map({name: place for place, name in enumerate(DTYPES)}),
    )
    return keys.sort_values(_ORDER, kind="stable").index
