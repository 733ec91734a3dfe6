"""Figures by layer: the sensitivity of each linear, and the magnitude of each channel of its input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from harness.records import Record
from harness.records.metrics import LINEAR_METRICS
from harness.reports.html.details import number

Json = dict[str, Any]

FIGURES = {metric.name: metric.long for metric in LINEAR_METRICS}  # those of the output first
LARGEST, DRAWN = 48, 160  # channels drawn in a plot: the largest, and in all


def sensitivity(records: Sequence[Record], labels: dict[str, str]) -> Json:
    """Runs with figures by linear: {linears: lists of [name, block, linear], runs: [{run, label, linears, figures}]}.

    `linears` of a run is the index of its list, which the runs of one model share. Runs with a measured sensitivity
    come first.
    """
    lists: list[list[list[Any]]] = []
    runs: list[Json] = []
    for record in records:
        rows = [row for row in record.layers if isinstance(row, dict) and "name" in row]
        figures = {name: [_rounded(row.get(name)) for row in rows] for name in FIGURES}
        measured = {name: values for name, values in figures.items() if any(value is not None for value in values)}
        if measured:
            linears = [[str(row["name"]), *place(str(row["name"]))] for row in rows]
            if linears not in lists:
                lists.append(linears)
            shared = {"run": record.run_id, "label": labels[record.run_id], "linears": lists.index(linears)}
            runs.append(shared | {"figures": measured})
    runs.sort(key=lambda run: "kl_alone" not in run["figures"])
    return {"linears": lists, "runs": runs, "titles": FIGURES}


def place(name: str) -> tuple[int, str]:
    """The block and the place in it: "model.layers.3.mlp.up_proj" is (3, "mlp.up_proj"); block 0 without a number."""
    match = re.match(r".*?\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (0, name)


def outliers(records: Sequence[Record], labels: dict[str, str]) -> list[Json]:
    """Runs with the largest magnitude of channels before and after smoothing: [{run, label, linears: {name: ...}}]."""
    runs = []
    for record in records:
        rows = record.analysis.outliers.items()
        linears = {str(name): drawn for name, row in rows if (drawn := channels(row))}
        if linears:
            runs.append({"run": record.run_id, "label": labels[record.run_id], "linears": linears})
    return runs


def channels(row: Any) -> Json | None:
    """Channels of a linear's input, the largest before smoothing first; of many, only some of the smaller ones.

    Returns: {total, rank, channel, before, after}, with `after` None where it was not measured; None for no channels.
    """
    before = row.get("before") if isinstance(row, dict) else None
    if not isinstance(before, list) or not before or not all(map(number, before)):
        return None
    order = sorted(range(len(before)), key=lambda channel: -before[channel])
    ranks = list(range(len(order)))
    if len(ranks) > DRAWN:
        step = (len(ranks) - LARGEST) / (DRAWN - LARGEST)
        ranks = ranks[:LARGEST] + [LARGEST + int(i * step) for i in range(DRAWN - LARGEST)]
    chosen = [order[rank] for rank in ranks]
    after = row.get("after")
    complete = isinstance(after, list) and len(after) == len(before)
    drawn = {"total": len(before), "rank": [rank + 1 for rank in ranks], "channel": chosen}
    drawn["before"] = [_rounded(before[channel]) for channel in chosen]
    drawn["after"] = [_rounded(after[channel]) for channel in chosen] if complete else None
    return drawn


def _rounded(value: Any) -> float | None:
    return float(f"{value:.4g}") if number(value) else None
