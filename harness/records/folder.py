"""Folders of records: all records of one, and the tables that are made from them.

A folder has its records as *.json files in it. A folder of committed records has them in `runs`, and `tables.yaml` next
to it, which lists the run ids of each table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from harness.config import build
from harness.records.record import Record
from harness.records.store import read
from harness.utils.errors import choices

TABLES = "tables.yaml"


Columns = Literal["short", "quality", "all"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What one table shows.

    title    a line above it; empty for none
    show     runs: a row for each run. kv: the sizes of their KV caches. sweeps: a row for each sweep
    runs     the run ids, or the names of the sweeps; all of the folder's if empty
    columns  the short set of columns, quality with its intervals, or all
    seeds    a row for each seed, or the mean of runs that differ in nothing else
    """

    title: str = ""
    show: Literal["runs", "kv", "sweeps"] = "runs"
    runs: tuple[str, ...] = ()
    columns: Columns = "short"
    seeds: Literal["all", "mean"] = "all"


def runs_of(folder: Path) -> Path:
    """The folder that contains the records: `runs` of a folder with tables, otherwise the folder itself."""
    return folder / "runs" if (folder / TABLES).is_file() else folder


def load_records(folder: Path) -> list[Record]:
    """All records of a folder; a file that is no record is named on stderr and left out.

    Raises: ValueError if there is no such folder.
    """
    if not runs_of(folder).is_dir():
        raise ValueError(f"runs={folder} is no folder; expected one with records, such as results/reference")
    records = []
    for path in sorted(runs_of(folder).glob("*.json")):
        try:
            records.append(read(path))
        except ValueError as error:
            sys.stderr.write(f"warning: {error}; left out\n")
    return records


def load_some(folder: Path) -> list[Record]:
    """All records of a folder that must have some.

    Raises: ValueError if it has none.
    """
    records = load_records(folder)
    if not records:
        raise ValueError(f"runs={folder} holds no records; run `make bench`, or name another folder")
    return records


def read_tables(folder: Path) -> dict[str, Table]:
    """The tables of a folder by name, from its tables.yaml.

    Raises: ValueError, in one line, if there is no such file, or an entry has an unknown key or value.
    """
    path = folder / TABLES
    try:
        entries = yaml.safe_load(path.read_text())
        return {name: build(Table, entry, name) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise ValueError(f"runs={folder} has no {TABLES}; name a folder that has one, or leave out table=") from error
    except (AttributeError, yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())}); expected NAME: {{runs: [ids]}}"
        ) from error


def table_of(folder: Path, name: str) -> Table:
    """A table of a folder by its name.

    Raises: ValueError if the folder has no such table.
    """
    tables = read_tables(folder)
    if name not in tables:
        raise ValueError(f"table={name} is unknown; {choices(name, list(tables))}")
    return tables[name]


def select(records: Sequence[Record], table: Table, folder: Path) -> list[Record]:
    """The records that a table shows.

    Raises: ValueError if it names a run that is not among them.
    """
    if not table.runs:
        return list(records)
    by_id = {record.run_id: record for record in records}
    if missing := [run for run in table.runs if run not in by_id]:
        raise ValueError(f"{folder / TABLES} names run {missing[0]}, which {runs_of(folder)} lacks; run it again")
    return [by_id[run] for run in table.runs]
