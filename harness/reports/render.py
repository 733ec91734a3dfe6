"""A table that is ready to be read, and the files it may become: Markdown, LaTeX, CSV, Parquet, or a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

FORMATS = ("md", "csv", "parquet", "latex")
_TEX = {"≈": r"$\approx$", "±": r"$\pm$", "->": r"$\to$"}


@dataclass(frozen=True)
class Sheet:
    """A table for machines, the same for people, and the lines that stand above and below the latter.

    frame    typed columns: CSV and Parquet
    shown    text cells: Markdown, LaTeX, the terminal
    stacked  of `shown`, columns that the terminal puts beside each other; the others name the row, in one cell
    beneath  of `shown`, columns that the terminal puts below others, by the other's name
    """

    frame: pd.DataFrame
    shown: pd.DataFrame
    head: str
    notes: Sequence[str]
    stacked: Sequence[str]
    beneath: Mapping[str, str] = field(default_factory=dict)


def markdown(sheet: Sheet) -> str:
    """The shown table in Markdown, what all rows share above it and notes below it."""
    lines = [sheet.head, "", sheet.shown.to_markdown(index=False, disable_numparse=True), ""]
    return "\n".join([*lines, *sheet.notes])


def latex(sheet: Sheet) -> str:
    r"""The shown table as a tabular with the rules of booktabs; needs \usepackage{booktabs}, and no other package."""
    styler = sheet.shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    table = styler.to_latex(hrules=True, column_format="l" * len(sheet.shown.columns))
    for sign, command in _TEX.items():
        table = table.replace(sign, command)
    comments = [f"% {line}\n" for text in (sheet.head, *sheet.notes) for line in text.splitlines()]
    return "".join(["% needs \\usepackage{booktabs}\n", *comments, table])


def draw(sheet: Sheet, console: Console) -> None:
    """The table for a terminal of 80 columns: what names a row in one cell, ratios below their figures."""
    console.print(sheet.head, markup=False, highlight=False)
    console.print(drawn(sheet))
    for line in sheet.notes:
        console.print(line, markup=False, highlight=False)


def drawn(sheet: Sheet) -> Table:
    """The table alone, as Rich draws it."""
    shown = sheet.shown
    figures = [name for name in sheet.stacked if name in shown]
    format_of = [name for name in ("method", "scheme", "bits") if name in shown]
    rest = [name for name in shown.columns if name not in (*format_of, *figures, *sheet.beneath.values())]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("run", no_wrap=True)
    for heading in figures:
        title = heading.replace(" / ", "/\n").replace(" ", "\n")
        table.add_column(title, justify="right", overflow="fold", no_wrap=heading == figures[0])
    for _, row in shown.iterrows():
        run = "\n".join(" ".join(str(row[name]) for name in names if row[name] != "-") for names in (format_of, rest))
        table.add_row(run, *(_stacked(row, heading, sheet.beneath.get(heading)) for heading in figures))
    return table


def emit(sheet: Sheet, form: str, output: str) -> None:
    """Write the sheet to the file `output`, or to stdout where that is empty; Parquet needs a file."""
    if form == "parquet":
        sheet.frame.to_parquet(output, index=False)
        sys.stdout.write(f"{output}\n")
        return
    written = {"md": markdown, "latex": latex, "csv": _csv}[form](sheet)
    if output:
        Path(output).write_text(written)
        return
    console = Console()
    if form == "md" and console.is_terminal:
        draw(sheet, console)
    else:
        sys.stdout.write(written + ("\n" if form == "md" else ""))


def between(text: str, mark: str = "table") -> tuple[str, str, str]:
    """What comes before the marked part of a Markdown text, the part, and what comes after, marks left outside it.

    Raises: ValueError if the text lacks the marks.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"lacks the lines {begin} and {end}; add them where the table belongs")
    head, _, rest = text.partition(begin)
    part, _, tail = rest.partition(end)
    return head + begin, part, end + tail


def write_into(path: Path, written: str, mark: str = "table") -> None:
    """Replace the marked part of a Markdown file.

    Raises: ValueError if the file lacks the marks.
    """
    try:
        head, _, tail = between(path.read_text() if path.is_file() else "", mark)
    except ValueError as error:
        raise ValueError(f"into={path} {error}") from error
    path.write_text(f"{head}\n{written.strip()}\n{tail}")


def _csv(sheet: Sheet) -> str:
    return sheet.frame.to_csv(index=False)


def _stacked(row: pd.Series[str], heading: str, beneath: str | None) -> str:
    """A figure over its spread and its ratio, and, as #2-4, what belongs beneath."""
    cell = row[heading].replace(" (", "\n").replace(" ± ", "\n± ").rstrip(")")
    below = row.get(beneath, "-") if beneath else "-"
    return cell if below == "-" else f"{cell}\n#{below}"
