"""The result of a comparison, figure by figure: drawn on a terminal, Markdown elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from harness.reports import markdown as md
from harness.reports.draw import rich_table
from harness.reports.tolerance import Tolerance

Word = Literal["PASS", "FAIL", "SKIP", "MISSING", "-"]

_HEADER = ("verdict", "run", "figure", "value", "expected", "difference", "tolerance", "note")
_COLOURS = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow", "MISSING": "yellow", "-": "dim"}
_NUMBERS = ("value", "expected", "difference", "tolerance")


@dataclass(frozen=True)
class Figure:
    """One figure and its expected value; without a tolerance it is shown and not judged.

    `value` is None if the run lacks the figure, `expected` if nothing could be compared.
    """

    run: str
    name: str
    value: float | None
    expected: float | None
    tolerance: Tolerance | None = None
    note: str = ""
    word: Word | None = None

    @property
    def verdict(self) -> Word:
        if self.word is not None:
            return self.word
        if self.tolerance is None:
            return "-"
        if self.value is None or self.expected is None:
            return "FAIL"
        return "PASS" if self.tolerance.holds(self.value, self.expected) else "FAIL"

    def cells(self) -> tuple[str, ...]:
        """The figure as text, in the order of the table's columns."""
        limit = "" if self.tolerance is None else str(self.tolerance)
        numbers = (_number(self.value), _number(self.expected), self._difference())
        better = " (better)" if self.better else ""
        return (self.verdict + better, self.run, self.name, *numbers, limit, self.note)

    @property
    def better(self) -> bool:
        """Whether the value passes although it is lower than expected by more than the tolerance."""
        if self.value is None or self.expected is None or self.tolerance is None:
            return False
        return self.tolerance.better(self.value, self.expected)

    def _difference(self) -> str:
        if self.value is None or self.expected is None:
            return ""
        if self.tolerance is None:
            return f"{self.value / self.expected:.2f}x" if self.expected else ""
        if self.value == self.expected:
            return "none"
        if not self.tolerance.relative:
            return f"{self.value - self.expected:+.2g}"
        return f"{100 * (self.value / self.expected - 1):+.3g} %"


@dataclass
class Report:
    """Figures, and lines that a reader of the figures must know."""

    title: str
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(figure.verdict == "FAIL" for figure in self.figures)

    def summary(self) -> str:
        """The verdict on the whole report, and the number of figures with each verdict."""
        counts = Counter(figure.verdict for figure in self.figures)
        counted = ", ".join(f"{counts[word]} {word}" for word in ("PASS", "FAIL", "SKIP", "MISSING") if counts[word])
        whole = "FAIL" if self.failed else ("PASS" if counts["PASS"] else "nothing was compared")
        return f"{whole}: {counted or 'no figures'}"

    def markdown(self) -> str:
        """The whole report in Markdown; cells are not padded, since notes are long."""
        table = md.table(_HEADER, [figure.cells() for figure in self.figures], _NUMBERS, pad=False)
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"# {self.title}", "", *notes, "", table, "", self.summary(), ""])

    def show(self) -> None:
        """Print the report."""
        console = Console()
        if not console.is_terminal:
            sys.stdout.write(self.markdown())
            return
        console.print(escape(self.title), style="bold", highlight=False)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)
        console.print(rich_table(_HEADER, [*_coloured(self.figures)], _NUMBERS))
        console.print(self.summary(), style="bold red" if self.failed else "green", highlight=False)


def emit(report: Report, output: str) -> int:
    """Print a report and, if `output` names a file, write it there as Markdown; 1 if a figure failed."""
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(report.markdown())
    report.show()
    return int(report.failed)


def _coloured(figures: Sequence[Figure]) -> Iterator[tuple[str, ...]]:
    """The cells of each figure as Rich markup; a run is named only on its first line."""
    previous = ""
    for figure in figures:
        verdict, run, *cells = figure.cells()
        name = "" if run == previous else run
        yield (f"[{_COLOURS[figure.verdict]}]{verdict}[/]", *map(escape, (name, *cells)))
        previous = run


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3e}" if abs(value) >= 1e6 else f"{value:.6g}"
