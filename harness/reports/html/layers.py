"""Figures by layer: how sensitive each linear is, and how large each channel of its input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from harness.records.store import Record
from harness.reports.html.details import number

Json = dict[str, Any]

# Figures of a record's `layers` rows and what they say, those of output first.
FIGURES = {
    "kl_alone": "KL with this linear alone quantized",
    "nll_alone": "nll with this linear alone quantized",
    "kl_without": "KL with all but this linear quantized",
    "nll_without": "nll with all but this linear quantized",
    "output_error": "relative error of the output",
    "hessian_error": "relative error, weighted by the Hessian",
    "weight_error": "relative error of the weight",
}
LARGEST, KEPT = 48, 160  # channels kept for a plot: the largest, and in all


def sensitivity(records: Sequence[Record], labels: dict[str, str]) -> Json:
    """Runs with figures by linear: {linears: lists of [name, block, linear], runs: [{run, label, linears, figures}]}.

    Those whose sensitivity was measured come first.

    `linears` of a run is the index of its list: runs of one model share one.
    """
    lists: list[list[list[Any]]] = []
    runs: list[Json] = []
    for record in records:
        rows = [row for row in record.layers if isinstance(row, dict) and "name" in row]
        figures = {name: [_rounded(row.get(name)) for row in rows] for name in FIGURES}
        known = {name: values for name, values in figures.items() if any(value is not None for value in values)}
        if known:
            linears = [[str(row["name"]), *place(str(row["name"]))] for row in rows]
            if linears not in lists:
                lists.append(linears)
            shared = {"run": record.run_id, "label": labels[record.run_id], "linears": lists.index(linears)}
            runs.append(shared | {"figures": known})
    runs.sort(key=lambda run: "kl_alone" not in run["figures"])
    return {"linears": lists, "runs": runs, "titles": FIGURES}


def place(name: str) -> tuple[int, str]:
    """The block and the place in it: "model.layers.3.mlp.up_proj" is (3, "mlp.up_proj"); 0 where there is no number."""
    found = re.match(r".*?\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (0, name)


def outliers(records: Sequence[Record], labels: dict[str, str]) -> list[Json]:
    """Runs with the largest magnitude of channels before and after smoothing: [{run, label, linears: {name: ...}}]."""
    runs = []
    for record in records:
        analysis = getattr(record, "analysis", None)
        given = analysis.outliers if analysis else None
        linears = {str(name): kept for name, row in given.items() if (kept := channels(row))} if given else {}
        if linears:
            runs.append({"run": record.run_id, "label": labels[record.run_id], "linears": linears})
    return runs


def channels(row: Any) -> Json | None:
    """Channels of a linear's input, the largest before smoothing first; where there are many, some of the smaller ones.

    Returns: {total, rank, channel, before, after}, with `after` None where it was not measured; None for no channels.
    """
    before = row.get("before") if isinstance(row, dict) else None
    if not isinstance(before, list) or not before or not all(map(number, before)):
        return None
    order = sorted(range(len(before)), key=lambda channel: -before[channel])
    ranks = list(range(len(order)))
    if len(ranks) > KEPT:
        step = (len(ranks) - LARGEST) / (KEPT - LARGEST)
        ranks = ranks[:LARGEST] + [LARGEST + int(i * step) for i in range(KEPT - LARGEST)]
    chosen = [order[rank] for rank in ranks]
    after = row.get("after")
    known = isinstance(after, list) and len(after) == len(before)
    kept = {"total": len(before), "rank": [rank + 1 for rank in ranks], "channel": chosen}
    kept["before"] = [_rounded(before[channel]) for channel in chosen]
    kept["after"] = [_rounded(after[channel]) for channel in chosen] if known else None
    return kept


def _rounded(value: Any) -> float | None:
    return float(f"{value:.4g}") if number(value) else None
