"""Which linears, or blocks, cost most: the sensitivities of a run, ranked, beside the errors that are cheap to have.

    python -m harness.attribution runs=FILE_OR_FOLDER [top=20]

Of a folder every finished run with analysis.sensitivity is shown. Markdown, or drawn on a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from harness.cli.options import options_of
from harness.records.store import Record, read
from harness.reports.frame import load

DEFAULTS = {"runs": "results/runs", "top": "20"}

Row = dict[str, Any]

_HEADINGS = (
    ("KL alone", "kl_alone", ".3g"),
    ("share", "share", ".1%"),
    ("KL without", "kl_without", ".3g"),
    ("nll alone", "nll_alone", ".4f"),
    ("weights", "params", "d"),
    ("bits", "bits_per_weight", ".3f"),
    ("weight error", "weight_error", ".4f"),
    ("output error", "output_error", ".4f"),
    ("Hessian error", "hessian_error", ".4f"),
)
_HEADING_OF = {key: heading for heading, key, _ in _HEADINGS}
_CHEAP = ("weight_error", "output_error", "hessian_error")


def ranked(record: Record) -> list[Row]:
    """A row for each linear or block, the costliest alone first, with its share of what all cost alone.

    Linears have the errors of the record's `layers` beside them.
    """
    layers = {layer["name"]: layer for layer in record.layers}
    total = sum(row["kl_alone"] for row in record.analysis.sensitivity)
    rows = [
        layers.get(row["name"], {}) | row | {"share": row["kl_alone"] / total if total else 0.0}
        for row in record.analysis.sensitivity
    ]
    return sorted(rows, key=lambda row: -float(row["kl_alone"]))


def correlations(rows: Sequence[Row]) -> dict[str, float]:
    """Spearman's rank correlation of each cheap error with `kl_alone`, for those that every row has."""
    kl = [row["kl_alone"] for row in rows]
    present = [name for name in _CHEAP if len(rows) > 1 and all(name in row for row in rows)]
    return {name: spearman([row[name] for row in rows], kl) for name in present}


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's correlation of ranks, equal values sharing the mean of theirs; nan where all of one side are equal."""
    ranks = torch.stack([_ranks(left), _ranks(right)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Sequence[float]) -> torch.Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    below = (found[:, None] > found).sum(1)
    return below + ((found[:, None] == found).sum(1) + 1) / 2


def found_in(path: Path) -> list[Record]:
    """The record in a file, or every finished one with sensitivities in a folder.

    Raises: ValueError if there is none.
    """
    records = load(path) if path.is_dir() else [read(path)]
    records = [record for record in records if record.status == "ok" and record.analysis.sensitivity]
    if not records:
        raise ValueError(f"runs={path} holds no finished run with analysis.sensitivity; run one with it first")
    return records


def summary(record: Record) -> list[str]:
    """What a table does not say: the run, the whole model's figures, and which cheap errors tell the order."""
    total, rows = record.analysis.total, ranked(record)
    scheme, method = record.config["scheme"], "+".join(record.config["method"])
    alone = sum(row["kl_alone"] for row in rows)
    lines = [
        f"{record.model.get('name')} {method} {scheme['name']} bits={scheme['weight']['bits']}, by {total['by']}, "
        f"{total['windows']} calibration sequences of {total['seq_len']} tokens (run {record.run_id})",
        f"all quantized: KL {total['kl']:.4g}, nll {total['nll']:.4f} (float {total['nll_float']:.4f}); "
        f"each alone, added up: KL {alone:.4g}",
    ]
    found = correlations(rows)
    told = ", ".join(f"{_HEADING_OF[name]} {value:.2f}" for name, value in found.items())
    return lines + ([f"rank correlation with KL alone: {told}"] if told else [])


def show(record: Record, top: int) -> None:
    """Print a run's ranking."""
    console = Console()
    rows = ranked(record)[:top]
    headings = ["rank", "name", *(heading for heading, key, _ in _HEADINGS if any(key in row for row in rows))]
    cells = [list(_cells(place, row, rows)) for place, row in enumerate(rows, 1)]
    if console.is_terminal:
        table = Table(*headings, box=box.SIMPLE_HEAD)
        for line in cells:
            table.add_row(*line)
        console.print("\n".join(summary(record)), markup=False, highlight=False)
        console.print(table)
        return
    lines = [headings, ["---"] * len(headings), *cells]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sys.stdout.write("\n\n".join([*summary(record), body]) + "\n")


def _cells(place: int, row: Row, rows: Iterable[Row]) -> Iterable[str]:
    yield str(place)
    yield row["name"]
    for _, key, digits in _HEADINGS:
        if any(key in other for other in rows):
            yield format(row[key], digits) if key in row else "-"


def main(arguments: Sequence[str]) -> int:
    """The command line; 0, or 1 with one line on stderr."""
    try:
        options = DEFAULTS | options_of(arguments, DEFAULTS)
        if not options["top"].isdigit() or int(options["top"]) < 1:
            raise ValueError(f"top={options['top']} is no number of rows; expected 1 or more")
        for record in found_in(Path(options["runs"])):
            show(record, int(options["top"]))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
