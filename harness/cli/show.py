"""Prints the table of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.records import Record, load_records
from harness.reports import show, to_frame
from harness.runs import stale_ids


def show_table(records: Sequence[Record]) -> None:
    """Print the table of these runs; its float baselines may be results of earlier commands."""
    folder = Path(str(records[0].config["results_dir"]))
    others = load_records(folder) if folder.is_dir() else ()
    show(to_frame(records, others, stale_ids(records)))
