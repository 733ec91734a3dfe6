"""The table of runs: a frame as a sheet."""

from __future__ import annotations

import pandas as pd

from harness.records.folder import Columns
from harness.reports.cells import RANK, display, figures, notes, shared
from harness.reports.render import Sheet, as_markdown, emit


def to_sheet(frame: pd.DataFrame, columns: Columns = "short", title: str = "") -> Sheet:
    """A frame with its table for people, in one of the sets of columns."""
    shown = display(frame, columns)
    head = [line for line in (title, shared(frame, columns)) if line]
    return Sheet(
        frame, shown, head, notes(frame), figures(frame, columns), {"perplexity": RANK} if RANK in shown else {}
    )


def to_markdown(frame: pd.DataFrame, columns: Columns = "short") -> str:
    """The table in Markdown: above it what all rows share, below it failed runs."""
    return as_markdown(to_sheet(frame, columns))


def show(frame: pd.DataFrame, columns: Columns = "short") -> None:
    """Print the table: drawn on a terminal, Markdown elsewhere."""
    emit(to_sheet(frame, columns), "md", "")
