"""The command line of tables: records, or what differs between two folders of them, in the format asked for.

    python -m harness.table [runs=FOLDER] [seeds=all|mean] [format=md|csv|parquet|latex] [output=FILE]
    python -m harness.table [runs=FOLDER] into=README.md [mark=table]
    python -m harness.table compare=OLD,NEW [seeds=all|mean] [format=md|csv|parquet|latex] [output=FILE]
    python -m harness.table show=sweeps|kv [runs=FOLDER] [format=md|csv|parquet|latex] [output=FILE] [into=README.md]

Each figure stands with its ratio to the float baseline. `seeds=mean` makes one row of runs that differ in their seed
alone. `into` replaces what stands between two marks of a Markdown file: <!-- table:begin --> and <!-- table:end -->, or
those of another name. OLD and NEW are two folders, or two records. `show=sweeps` says where the time of sweeps went,
`show=kv` what KV caches take by batch and length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from harness.cli.options import options_of
from harness.reports.cells import RANK, SHOWN, display, failures, shared
from harness.reports.compare import compare
from harness.reports.frame import label, load, load_some, to_frame
from harness.reports.kv_table import kv_sheet
from harness.reports.render import FORMATS, Sheet, between, emit, markdown, write_into
from harness.reports.seeds import mean_over_seeds
from harness.reports.sweep_table import sweeps_sheet

__all__ = [
    "between",
    "display",
    "label",
    "load",
    "main",
    "markdown",
    "show",
    "sweeps_sheet",
    "to_frame",
    "to_markdown",
    "write_into",
]

DEFAULTS = {
    "runs": "results/runs",
    "compare": "",
    "show": "runs",
    "seeds": "all",
    "format": "md",
    "output": "",
    "into": "",
    "mark": "table",
}
_CHOICES = {"format": FORMATS, "seeds": ("all", "mean"), "show": ("runs", "sweeps", "kv")}
# Options that would be read by nobody beside another.
_APART = (("compare", "runs"), ("compare", "into"), ("compare", "show"), ("into", "format"), ("into", "output"))


def to_sheet(frame: pd.DataFrame) -> Sheet:
    """The frame with its table as people read it."""
    stacked = [heading for heading, *_ in SHOWN]
    return Sheet(frame, display(frame), shared(frame), failures(frame), stacked, {"perplexity": RANK})


def to_markdown(frame: pd.DataFrame) -> str:
    """The shown table in Markdown, what all rows share above it and failures below it."""
    return markdown(to_sheet(frame))


def show(frame: pd.DataFrame) -> None:
    """Print the table: drawn on a terminal, Markdown elsewhere."""
    emit(to_sheet(frame), "md", "")


def main(arguments: Sequence[str]) -> int:
    """The command line; 0, or 1 with one line on stderr."""
    try:
        options = _options(arguments)
        if options["compare"]:
            _compare(options)
        else:
            _table(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _table(options: dict[str, str]) -> None:
    folder = Path(options["runs"])
    sheet = _sheet(options["show"], folder, options["seeds"] == "mean")
    if options["into"]:
        write_into(Path(options["into"]), markdown(sheet), options["mark"])
        return
    default = folder / "table.parquet" if options["format"] == "parquet" else ""
    emit(sheet, options["format"], options["output"] or str(default))


def _sheet(show: str, folder: Path, mean: bool) -> Sheet:
    if show == "sweeps":
        return sweeps_sheet(folder)
    records = load_some(folder)
    if show == "kv":
        return kv_sheet(records)
    return to_sheet(to_frame(mean_over_seeds(records) if mean else records))


def _compare(options: dict[str, str]) -> None:
    if options["format"] == "parquet" and not options["output"]:
        raise ValueError("format=parquet needs a file where two folders are compared; add output=FILE.parquet")
    emit(compare(options["compare"], options["seeds"] == "mean"), options["format"], options["output"])


def _options(arguments: Sequence[str]) -> dict[str, str]:
    given = options_of(arguments, DEFAULTS)
    for key, choices in _CHOICES.items():
        if given.get(key, DEFAULTS[key]) not in choices:
            raise ValueError(f"{key}={given[key]} is unknown; expected one of: {', '.join(choices)}")
    for one, other in _APART:
        if one in given and other in given:
            raise ValueError(f"{other}={given[other]} means nothing beside {one}={given[one]}; drop one of them")
    return DEFAULTS | given
