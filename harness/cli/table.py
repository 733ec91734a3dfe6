"""Tables of records, or the differences between two folders of them: `python -m harness table [KEY=VALUE ...]`.

`harness.cli.commands` describes the options. `table` names a table of FOLDER/tables.yaml, which lists the rows and
columns of each; the records are then in FOLDER/runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from harness.cli.commands import TABLE, file_of, run_command
from harness.records import folder as folders
from harness.records.folder import Columns
from harness.reports import (
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


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    return run_command(TABLE, arguments, _run)


def _run(options: dict[str, str]) -> None:
    for key in ("output", "into"):
        if options[key]:
            file_of(key, options[key])
    if options["compare"]:
        _compare(options)
    else:
        _table(options)


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
    if options["failed"] != "show":
        rows = [record for record in rows if (record.status != "ok") == (options["failed"] == "list")]
    if kind == "kv":
        return kv_sheet(rows, stale, table.title)
    if "mean" in (options["seeds"], table.seeds):
        rows = mean_over_seeds(rows)
    columns = cast(Columns, options["columns"] or table.columns)
    return to_sheet(to_frame(rows, records, stale), columns, table.title)


def _compare(options: dict[str, str]) -> None:
    if options["format"] == "parquet" and not options["output"]:
        raise ValueError("format=parquet needs a file where two folders are compared; add output=FILE.parquet")
    emit(comparison_sheet(options["compare"], options["seeds"] == "mean"), options["format"], options["output"])
