"""The table of all runs: cells with the text that is read, and the value by which they sort and are filtered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.reports.frame import has_coded_caches
from harness.reports.html.pareto import TIMES

# Columns that describe a run: those that are always shown, and those shown where rows differ, before and after figures.
ALWAYS = ("method", "scheme", "bits")
BEFORE = ("options", "kv", "dtype", "execution")
AFTER = ("calibration", "model", "data", "windows", "device", "seed", "protocol_class", "environment_class")
# Figures: heading, unit, value, its ratio, digits.
FIGURES = (
    ("perplexity", "", "perplexity", "perplexity_ratio", ".2f"),
    ("KL", "nats", "kl", None, ".4f"),
    ("top-1 agreement", "", "top1_agreement", None, ".3f"),
    ("bits per weight", "", "bits_per_weight", "bits_per_weight_ratio", ".3f"),
    ("model size", "MiB", "model_size_mib", "model_size_mib_ratio", ".1f"),
    ("resident", "MiB", "resident_mib", "resident_mib_ratio", ".1f"),
    ("peak", "MiB", "peak_memory_mib", "peak_memory_mib_ratio", ".0f"),
    ("prefill", "ms", "prefill_ms_p50", "prefill_speedup", ".0f"),
    ("decode", "ms", "decode_ms_p50", "decode_speedup", ".1f"),
    ("KV cache", "MiB", "kv_mib", "kv_mib_ratio", ".2f"),
    ("KV per token", "bytes", "kv_bytes_per_token", None, ".0f"),
    ("prefill energy", "J", "prefill_j", None, ".2f"),
    ("decode energy", "J a token", "decode_j_per_token", None, ".3f"),
    ("quantize", "s", "quantize_s", None, ".1f"),
)


@dataclass(frozen=True)
class Column:
    """A column: `unit` stands below the heading, figures sort and filter as numbers."""

    heading: str
    unit: str
    figure: bool


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, what stands below it, and the value it sorts by; None where nothing was measured."""

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
    """Columns that say something, and a row for each run."""
    before = [*ALWAYS, *_differing(frame, BEFORE)]
    after = [*_differing(frame, AFTER), *(["status"] if (frame["status"] != "ok").any() else [])]
    figures = [figure for figure in FIGURES if figure[2] in frame and frame[figure[2]].notna().any()]
    if not has_coded_caches(frame):
        figures = [figure for figure in figures if not figure[2].startswith("kv_")]
    columns = [Column(heading, unit, True) for heading, unit, *_ in figures]
    columns = [*map(_describing, before), *columns, *map(_describing, after)]
    rows = []
    for _, row in frame.iterrows():
        cells = [_described(row, name) for name in before]
        cells += [_figure(row, *figure[2:]) for figure in figures]
        cells += [_described(row, name) for name in after]
        rows.append(Row(row["run_id"], row["method"], row["status"] != "ok", cells))
    return columns, rows


def _differing(frame: pd.DataFrame, names: Sequence[str]) -> list[str]:
    return [name for name in names if frame[name].nunique() > 1]


def _describing(name: str) -> Column:
    return Column(name.removesuffix("_class"), "", name in ("bits", "windows", "seed"))


def _described(row: pd.Series[Any], name: str) -> Cell:
    value = row[name]
    if value is None or pd.isna(value) or value == "":
        return Cell("", order="")
    if isinstance(value, float):
        return Cell(f"{value:g}", order=value)
    if name == "execution" and not pd.isna(row["kernel"]):
        return Cell(value, row["kernel"], f"{value} {row['kernel']}")
    return Cell(str(value), order=str(value))


def _figure(row: pd.Series[Any], value: str, ratio: str | None, digits: str) -> Cell:
    if pd.isna(row[value]):
        return Cell("-")
    text = format(row[value], digits if row[value] < 1e5 else ".3g")
    if ratio is None or pd.isna(row.get(ratio)):
        return Cell(text, order=float(row[value]))
    return Cell(text, f"{row[ratio]:{'.2f' if row[ratio] < 1e3 else '.2g'}}{TIMES}", float(row[value]))
