"""Which linears, or blocks, cost most: the sensitivities of a run, ranked, with errors that are cheap to compute."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.records import Record, read
from harness.records.folder import load_records
from harness.records.metrics import LINEAR_METRICS, metric_of
from harness.reports.cells import STALE, STALE_NOTE
from harness.reports.describe import code_bits
from harness.reports.frame import is_stale
from harness.reports.names import told_apart
from harness.reports.render import Sheet

Row = dict[str, Any]

_BITS = metric_of("bits_per_weight")
# Columns: heading, key of a row, format. The share of a linear stands next to what it costs alone.
_KL_ALONE, *_METRICS = [(metric.heading, metric.name, metric.digits) for metric in LINEAR_METRICS if metric.heading]
_COLUMNS = [
    _KL_ALONE,
    ("share", "share", ".1%"),
    *_METRICS,
    ("weights", "params", "d"),
    (_BITS.heading, _BITS.name, _BITS.digits),
]
_CHEAP = {metric.name: metric.heading for metric in LINEAR_METRICS if metric.name.endswith("_error")}


def analysed(path: Path) -> list[Record]:
    """The record in a file, or every finished record with sensitivities in a folder.

    Raises: ValueError if there is none.
    """
    records = load_records(path) if path.is_dir() else [read(path)]
    records = [record for record in told_apart(records) if record.status == "ok" and record.analysis.sensitivity]
    if not records:
        raise ValueError(f"runs={path} holds no finished run with analysis.sensitivity; run one with it first")
    return records


def ranking_sheet(record: Record, top: int, stale: Set[str] = frozenset()) -> Sheet:
    """The sheet of the `top` linears, or blocks, of a run that cost most alone."""
    rows = ranked(record)
    shown = pd.DataFrame(
        {"rank": [str(place) for place in range(1, len(rows) + 1)], "name": [row["name"] for row in rows]}
    )
    for heading, key, digits in _COLUMNS:
        if any(key in row for row in rows):
            shown[heading] = [format(row[key], digits) if key in row else "-" for row in rows]
    old = is_stale(record.run_id, stale)
    first, *lines = summary(record, rows)
    head = [f"{first} {STALE}" if old else first, *lines]
    figures = ["rank", *(str(heading) for heading, *_ in _COLUMNS)]
    return Sheet(pd.DataFrame(rows), shown.head(top), head, [STALE_NOTE] if old else [], figures)


def ranked(record: Record) -> list[Row]:
    """A row for each linear or block, the costliest alone first, with its share of the sum of all.

    Rows of linears also have the errors of the record's `layers`.
    """
    layers = {layer["name"]: layer for layer in record.layers}
    total = sum(row["kl_alone"] for row in record.analysis.sensitivity)
    rows = [
        layers.get(row["name"], {}) | row | {"share": row["kl_alone"] / total if total else 0.0}
        for row in record.analysis.sensitivity
    ]
    return sorted(rows, key=lambda row: -float(row["kl_alone"]))


def summary(record: Record, rows: Sequence[Row]) -> list[str]:
    """The run, the figures of the whole model, and how well the cheap errors tell the order."""
    total = record.analysis.total
    scheme, method = record.config["scheme"], "_".join(record.config["method"])
    alone = sum(row["kl_alone"] for row in rows)
    lines = [
        f"{record.model.name} {method} {scheme['name']} bits={code_bits(scheme['weight'])}, by {total['by']}, "
        f"{total['windows']} calibration sequences of {total['seq_len']} tokens (run {record.run_id})",
        f"all quantized: KL {total['kl']:.4g}, nll {total['nll']:.4f} (float {total['nll_float']:.4f}); "
        f"sum over each alone: KL {alone:.4g}",
    ]
    values = ", ".join(f"{_CHEAP[name]} {value:.2f}" for name, value in correlations(rows).items())
    return lines + ([f"rank correlation with KL alone: {values}"] if values else [])


def correlations(rows: Sequence[Row]) -> dict[str, float]:
    """Spearman's rank correlation with `kl_alone` of each cheap error that every row has."""
    kl = [row["kl_alone"] for row in rows]
    names = [name for name in _CHEAP if len(rows) > 1 and all(name in row for row in rows)]
    return {name: spearman([row[name] for row in rows], kl) for name in names}


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of ranks; equal values share their mean rank. NaN if all values of a side are equal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    column = np.asarray(values, dtype=np.float64)
    below, equal = (column[:, None] > column).sum(1), (column[:, None] == column).sum(1)
    ranks: np.ndarray[Any, np.dtype[np.float64]] = below + (equal + 1) / 2
    return ranks
