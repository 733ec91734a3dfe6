"""Tables on a terminal: one line for each row where that fits, else figures above their ratios, else several tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Lines = Sequence[Sequence[str]]

_WIDEST = Console(width=4096)  # every table fits on it
# Ways to split the cell that names a row into lines; its other columns are the last line.
_TWO_LINES: Lines = (("method",),)
_THREE_LINES: Lines = (("method",), ("scheme", "bits"))


def drawn(shown: pd.DataFrame, figures: Sequence[str], beneath: Mapping[str, str], width: int) -> list[Table]:
    """A table of text cells for a terminal of `width` columns, in several parts if it is too wide for one.

    `figures` are the columns aligned right. Where one line for each row is too wide, all other columns become one cell,
    a ratio stands below its figure, and so do the columns `beneath`, by the column that they belong to.
    """
    columns = [name for name in figures if name in shown]
    cells = [[escape(cell) for cell in row] for row in shown.to_numpy()]
    flat = rich_table(list(shown.columns), cells, [*columns, *beneath.values()])
    for table in (flat, _stacked(shown, columns, beneath, _TWO_LINES)):
        if _WIDEST.measure(table).maximum <= width:
            return [table]
    tables = [flat]
    for size in range(len(columns), 0, -1):
        parts = [columns[start : start + size] for start in range(0, len(columns), size)]
        tables = [_stacked(shown, part, beneath, _THREE_LINES, set(columns)) for part in parts]
        if all(_WIDEST.measure(table).minimum <= width for table in tables):
            break
    return tables


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


def _stacked(
    shown: pd.DataFrame, columns: Sequence[str], beneath: Mapping[str, str], split: Lines, figures: Collection[str] = ()
) -> Table:
    """The table of some `columns` of all `figures`, after one cell that names the row."""
    naming = [name for name in shown.columns if name not in (*columns, *figures, *beneath.values())]
    lines = [[name for name in line if name in naming] for line in split]
    lines.append([name for name in naming if not any(name in line for line in split)])
    rows = [
        [_named(row, lines), *(_figure(row, name, beneath.get(name)) for name in columns)]
        for _, row in shown.iterrows()
    ]
    return rich_table(["run", *columns], rows, columns)


def _named(row: pd.Series[str], lines: Lines) -> str:
    texts = (" ".join(row[name] for name in line if row[name] not in ("", "-")) for line in lines)
    return escape("\n".join(text for text in texts if text))


def _figure(row: pd.Series[str], name: str, beneath: str | None) -> str:
    """A figure above its standard deviation, its ratio and, as #2-4, the column beneath."""
    cell = row[name].replace(" (", "\n").replace(" ± ", "\n± ").rstrip(")")
    below = row.get(beneath, "-") if beneath else "-"
    return escape(cell if below == "-" else f"{cell}\n#{below}")
