"""A finished table, and where it goes: Markdown, LaTeX, CSV, Parquet, or a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console

from harness.reports import markdown as md
from harness.reports.draw import drawn

FORMATS = ("md", "csv", "parquet", "latex")
_TEX = {"≈": r"$\approx$", "±": r"$\pm$", "†": r"$\dagger$", "->": r"$\to$"}


@dataclass(frozen=True)
class Sheet:
    """A table for programs, the same table for people, and the texts around the latter.

    frame    typed columns, for CSV and Parquet
    shown    text cells, for Markdown, LaTeX and the terminal
    head     paragraphs above the table
    notes    lines below it
    figures  the columns of `shown` that are numbers; the others name the row
    beneath  columns of `shown` that a narrow terminal shows below others, by the name of the other
    """

    frame: pd.DataFrame
    shown: pd.DataFrame
    head: Sequence[str]
    notes: Sequence[str]
    figures: Sequence[str]
    beneath: Mapping[str, str] = field(default_factory=dict)


def as_markdown(sheet: Sheet) -> str:
    """The shown table in Markdown, between its head and its notes."""
    numbers = (*sheet.figures, *sheet.beneath.values())
    table = md.table(list(sheet.shown.columns), sheet.shown.to_numpy().tolist(), numbers)
    paragraphs = [*map(md.paragraph, sheet.head), table, "\n".join(sheet.notes)]
    return "\n\n".join(part for part in paragraphs if part) + "\n"


def as_latex(sheet: Sheet) -> str:
    r"""The shown table as a tabular with the rules of booktabs; needs \usepackage{booktabs} and no other package."""
    styler = sheet.shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    table = styler.to_latex(hrules=True, column_format="l" * len(sheet.shown.columns))
    for sign, command in _TEX.items():
        table = table.replace(sign, command)
    comments = [f"% {line}\n" for text in (*sheet.head, *sheet.notes) for line in text.splitlines()]
    return "".join(["% needs \\usepackage{booktabs}\n", *comments, table])


def draw(sheet: Sheet, console: Console) -> None:
    """Print a sheet on a terminal, all of it wrapped to its width."""
    for line in sheet.head:
        console.print(line, markup=False, highlight=False)
    for table in drawn(sheet.shown, sheet.figures, sheet.beneath, console.width):
        console.print(table)
    for line in sheet.notes:
        console.print(line, markup=False, highlight=False)


def emit(sheet: Sheet, form: str, output: str) -> None:
    """Write the sheet to the file `output`, or to stdout if that is empty; Parquet needs a file."""
    if form == "parquet":
        sheet.frame.to_parquet(output, index=False)
        sys.stdout.write(f"{output}\n")
        return
    text = {"md": as_markdown, "latex": as_latex, "csv": _csv}[form](sheet)
    if output:
        Path(output).write_text(text)
        return
    console = Console()
    if form == "md" and console.is_terminal:
        draw(sheet, console)
    else:
        sys.stdout.write(text)


def _csv(sheet: Sheet) -> str:
    return sheet.frame.to_csv(index=False)
