"""Tables of records, or the differences between two folders of them.

    python -m harness table [runs=FOLDER] [table=NAME] [columns=short|all] [stale=mark|hide|list] [seeds=all|mean]
                            [format=md|csv|parquet|latex] [output=FILE]
    python -m harness table [runs=FOLDER] [table=NAME] into=FILE.md [mark=NAME]
    python -m harness table compare=OLD,NEW [seeds=all|mean] [format=md|csv|parquet|latex] [output=FILE]
    python -m harness table show=sweeps|kv [runs=FOLDER] [format=md|csv|parquet|latex] [output=FILE] [into=FILE.md]

Figures are shown with their ratio to the float baseline. `table` names a table of FOLDER/tables.yaml, which lists the
rows and columns of each; the records are then in FOLDER/runs. CSV and Parquet have every column. `stale` marks rows
that are results of other code than today's, leaves them out, or shows only them. `seeds=mean` makes one row of runs
that differ only in their seed. `into` replaces the part between the lines <!-- NAME:begin --> and <!-- NAME:end --> of
a Markdown file; `mark` is the name of the table, or "table", by default. OLD and NEW are two folders, or two records.
`show=sweeps` shows where the time of sweeps went, `show=kv` the sizes of KV caches by batch and length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from harness.cli.options import options_of
from harness.records import folder as folders
from harness.reports import (
    FORMATS,
    Columns,
    Sheet,
    as_markdown,
    comparison_sheet,
    emit,
    kv_sheet,
    mean_over_seeds,
    sweeps_sheet,
    to_frame,
    to_sheet,
    write_into,
)
from harness.runs import stale_ids

DEFAULTS = {
    "runs": "results/runs",
    "table": "",
    "compare": "",
    "show": "",
    "columns": "",
    "stale": "mark",
    "seeds": "all",
    "format": "md",
    "output": "",
    "into": "",
    "mark": "",
}
_CHOICES = {
    "format": FORMATS,
    "seeds": ("all", "mean"),
    "show": ("runs", "sweeps", "kv"),
    "columns": get_args(Columns),
    "stale": ("mark", "hide", "list"),
}
# Pairs of options of which one would be ignored.
_APART = (
    ("compare", "runs"),
    ("compare", "into"),
    ("compare", "show"),
    ("compare", "table"),
    ("compare", "columns"),
    ("compare", "stale"),
    ("table", "show"),
    ("into", "format"),
    ("into", "output"),
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
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
    table = folders.table_of(folder, options["table"]) if options["table"] else folders.Table()
    sheet = _sheet(folder, table, options)
    if options["into"]:
        write_into(Path(options["into"]), as_markdown(sheet), options["mark"] or options["table"] or "table")
        return
    default = folder / "table.parquet" if options["format"] == "parquet" else ""
    emit(sheet, options["format"], options["output"] or str(default))


def _sheet(folder: Path, table: folders.Table, options: dict[str, str]) -> Sheet:
    kind = options["show"] or table.show
    if kind == "sweeps":
        return sweeps_sheet(folders.runs_of(folder), table.runs, table.title)
    records = folders.load_some(folder)
    stale = stale_ids(records)
    rows = folders.select(records, table, folder)
    if options["stale"] != "mark":
        rows = [record for record in rows if (record.run_id in stale) == (options["stale"] == "list")]
    if kind == "kv":
        return kv_sheet(rows, stale, table.title)
    if options["seeds"] == "mean":
        rows = mean_over_seeds(rows)
    columns: Columns = "all" if (options["columns"] or table.columns) == "all" else "short"
    return to_sheet(to_frame(rows, records, stale), columns, table.title)


def _compare(options: dict[str, str]) -> None:
    if options["format"] == "parquet" and not options["output"]:
        raise ValueError("format=parquet needs a file where two folders are compared; add output=FILE.parquet")
    emit(comparison_sheet(options["compare"], options["seeds"] == "mean"), options["format"], options["output"])


def _options(arguments: Sequence[str]) -> dict[str, str]:
    options = options_of(arguments, DEFAULTS)
    for key, choices in _CHOICES.items():
        if key in options and options[key] not in choices:
            raise ValueError(f"{key}={options[key]} is unknown; expected one of: {', '.join(choices)}")
    for one, other in _APART:
        if one in options and other in options:
            raise ValueError(f"{other}={options[other]} means nothing with {one}={options[one]}; drop one of them")
    return DEFAULTS | options
