"""The sizes of KV caches as a table: a row for each format, MiB by batch and length up to the positions of a model."""

from __future__ import annotations

from collections.abc import Sequence, Set

import pandas as pd

from harness.records import Record
from harness.reports.cells import STALE, STALE_NOTE, text, times
from harness.reports.describe import describe
from harness.reports.frame import is_stale
from harness.reports.names import told_apart
from harness.reports.render import Sheet

_HEAD = "MiB of a KV cache, by sequences x tokens; with x: ratio to the model's float cache of the same length"
_FLOAT = "none"
_NAMES = ("model", "dtype", "kv")


def kv_sheet(records: Sequence[Record], stale: Set[str] = frozenset(), title: str = "") -> Sheet:
    """The sheet of the caches of `records`; runs with the same model, float type and cache share a row.

    A row is marked if the run that it shows is among the ids `stale`.

    Raises: ValueError if no record has such figures.
    """
    shown = {_key(record): record for record in told_apart(records) if record.kv}
    if not shown:
        raise ValueError("show=kv finds no record with figures of a KV cache; expected a run that is packed or float")
    frame = pd.DataFrame([_row(shown[key]) for key in sorted(shown)])
    frame["stale"] = [is_stale(shown[key].run_id, stale) for key in sorted(shown)]
    notes = [STALE_NOTE] if frame["stale"].any() else []
    figures = [name for name in frame.columns if name not in (*_NAMES, "stale")]
    return Sheet(frame, _shown(frame, figures), [line for line in (title, _HEAD) if line], notes, figures)


def _shown(frame: pd.DataFrame, figures: Sequence[str]) -> pd.DataFrame:
    floats = frame[frame["kv"] == _FLOAT].drop(columns="kv")
    baselines = frame[["model", "dtype"]].merge(floats, on=["model", "dtype"], how="left").set_axis(frame.index)
    naming = [name for name in ("model", "dtype") if frame[name].nunique() > 1] + ["kv"]
    shown = pd.DataFrame({name: [text(value) for value in frame[name]] for name in naming})
    signs = [f" {STALE}" if old else "" for old in frame["stale"]]
    shown[naming[0]] = [cell + sign for cell, sign in zip(shown[naming[0]], signs, strict=True)]
    for name in figures:
        shown[name] = [_cell(value, base) for value, base in zip(frame[name], baselines[name], strict=True)]
    return shown


def _key(record: Record) -> tuple[str, str, bool, str]:
    row = describe(record)
    return str(row["model"]), str(row["dtype"]), row["kv"] != _FLOAT, str(row["kv"])


def _row(record: Record) -> dict[str, object]:
    model, dtype, _, kv = _key(record)
    row: dict[str, object] = dict(zip(_NAMES, (model, dtype, kv), strict=True))
    row["bytes / token"] = record.metrics.get("kv_bytes_per_token")
    return row | {f"{size['batch']} x {size['length']}": size["mib"] for size in record.kv}


def _cell(value: float, baseline: float) -> str:
    if pd.isna(value):
        return "-"
    shown = format(value, ",.0f" if value >= 100 else ".1f")
    return shown if pd.isna(baseline) else f"{shown} ({times(value / baseline)})"
