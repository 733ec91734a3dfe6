"""What KV caches take, as a table: a row a format, MiB by batch and length as far as a model's positions reach."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from harness.records.store import Record
from harness.reports.cells import text, times
from harness.reports.frame import describe
from harness.reports.render import Sheet

_HEAD = "MiB that a KV cache holds, by sequences x tokens; with x: ratio to the model's float cache of the same length"
_FLOAT = "none"


def kv_sheet(records: Sequence[Record]) -> Sheet:
    """The sheet of the caches of `records`; runs that share a model, its float type and a cache share a row.

    Raises: ValueError if no record has such figures.
    """
    rows = {_key(record): _row(record) for record in records if record.kv}
    if not rows:
        raise ValueError("show=kv finds no record with figures of a KV cache; expected a run that is packed or float")
    frame = pd.DataFrame([rows[key] for key in sorted(rows)])
    floats = frame[frame["kv"] == _FLOAT].drop(columns="kv")
    same = frame[["model", "dtype"]].merge(floats, on=["model", "dtype"], how="left").set_axis(frame.index)
    figures = [name for name in frame.columns if name not in ("model", "dtype", "kv")]
    shown = pd.DataFrame({name: [text(value) for value in frame[name]] for name in _telling(frame)})
    for name in figures:
        shown[name] = [_cell(value, base) for value, base in zip(frame[name], same[name], strict=True)]
    return Sheet(frame, shown, _HEAD, [], figures)


def _telling(frame: pd.DataFrame) -> list[str]:
    return [name for name in ("model", "dtype") if frame[name].nunique() > 1] + ["kv"]


def _key(record: Record) -> tuple[str, str, bool, str]:
    row = describe(record)
    return str(row["model"]), str(row["dtype"]), row["kv"] != _FLOAT, str(row["kv"])


def _row(record: Record) -> dict[str, object]:
    model, dtype, _, kv = _key(record)
    found: dict[str, object] = {"model": model, "dtype": dtype, "kv": kv}
    found["bytes / token"] = record.metrics.get("kv_bytes_per_token")
    return found | {f"{row['batch']} x {row['length']}": row["mib"] for row in record.kv}


def _cell(value: float, base: float) -> str:
    if pd.isna(value):
        return "-"
    shown = format(value, ",.0f" if value >= 100 else ".1f")
    return shown if pd.isna(base) else f"{shown} ({times(value / base)})"
