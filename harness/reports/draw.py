"""Tables on a terminal: a line for each row where that fits, else figures above their ratios."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_WIDEST = 4096  # columns of a terminal on which every table fits
_LINES = (("method",), ("scheme", "bits"))  # of the cell that names a row; its other columns follow below


def drawn(shown: pd.DataFrame, figures: Sequence[str], beneath: Mapping[str, str], width: int) -> Table:
    """A table of text cells for a terminal of `width` columns.

    `figures` are the columns aligned right. Where one line for each row is too wide, all other columns become one cell,
    a ratio stands below its figure, and so do the columns `beneath`, by the column that they belong to.
    """
    flat = rich_table(list(shown.columns), [[escape(cell) for cell in row] for row in shown.to_numpy()], figures)
    if Console(width=_WIDEST).measure(flat).maximum <= width:
        return flat
    return _stacked(shown, figures, beneath)


def rich_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> Table:
    """A table in the style of all tables; cells are Rich markup, `numbers` are columns aligned right, not wrapped."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for heading in headings:
        number = heading in numbers
        title = heading.replace(" / ", "/\n").replace(" ", "\n") if number else heading
        table.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _stacked(shown: pd.DataFrame, figures: Sequence[str], beneath: Mapping[str, str]) -> Table:
    columns = [name for name in figures if name in shown]
    naming = [name for name in shown.columns if name not in (*columns, *beneath.values())]
    lines = [[name for name in line if name in naming] for line in _LINES]
    lines.append([name for name in naming if name not in sum(_LINES, ())])
    rows = [
        [_named(row, lines), *(_figure(row, name, beneath.get(name)) for name in columns)]
        for _, row in shown.iterrows()
    ]
    return rich_table(["run", *columns], rows, columns)


def _named(row: pd.Series[str], lines: Sequence[Sequence[str]]) -> str:
    texts = (" ".join(row[name] for name in line if row[name] not in ("", "-")) for line in lines)
    return escape("\n".join(text for text in texts if text))


def _figure(row: pd.Series[str], name: str, beneath: str | None) -> str:
    """A figure above its standard deviation, its ratio and, as #2-4, the column beneath."""
    cell = row[name].replace(" (", "\n").replace(" ± ", "\n± ").rstrip(")")
    below = row.get(beneath, "-") if beneath else "-"
    return escape(cell if below == "-" else f"{cell}\n#{below}")
