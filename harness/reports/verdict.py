"""What a comparison found, figure by figure: drawn on a terminal, Markdown elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.reports.tolerance import Tolerance

Word = Literal["PASS", "FAIL", "SKIP", "MISSING", "-"]

_HEADER = ("verdict", "run", "figure", "value", "expected", "difference", "tolerance", "note")
_COLOURS = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow", "MISSING": "yellow", "-": "dim"}
_NUMBERS = ("value", "expected", "difference", "tolerance")


@dataclass(frozen=True)
class Figure:
    """One figure beside the one it should be; without a tolerance it is shown and not judged.

    `value` is None where the run has no such figure, `expected` where it could not be compared at all.
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
        """As text, in the order of the table's columns."""
        limit = "" if self.tolerance is None else str(self.tolerance)
        numbers = (_number(self.value), _number(self.expected), self._difference())
        better = " (better)" if self.better else ""
        return (self.verdict + better, self.run, self.name, *numbers, limit, self.note)

    @property
    def better(self) -> bool:
        """Whether the value passes for being lower than it had to be."""
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
    """Figures, and lines of what has to be known beside them."""

    title: str
    notes: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(figure.verdict == "FAIL" for figure in self.figures)

    def summary(self) -> str:
        """The verdicts counted, the whole one first."""
        counts = Counter(figure.verdict for figure in self.figures)
        counted = ", ".join(f"{counts[word]} {word}" for word in ("PASS", "FAIL", "SKIP", "MISSING") if counts[word])
        whole = "FAIL" if self.failed else ("PASS" if counts["PASS"] else "nothing was compared")
        return f"{whole}: {counted or 'no figures'}"

    def markdown(self) -> str:
        """The whole report in Markdown."""
        table = [
            "| " + " | ".join(_HEADER) + " |",
            "|" + "|".join("--:" if h in _NUMBERS else "---" for h in _HEADER) + "|",
        ]
        table += ["| " + " | ".join(figure.cells()) + " |" for figure in self.figures]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"# {self.title}", "", *notes, "", *table, "", self.summary(), ""])

    def show(self) -> None:
        """Print the report."""
        console = Console()
        if not console.is_terminal:
            sys.stdout.write(self.markdown())
            return
        console.print(escape(self.title), style="bold", highlight=False)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)
        console.print(self._drawn())
        console.print(self.summary(), style="bold red" if self.failed else "green", highlight=False)

    def _drawn(self) -> Table:
        drawn = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        for heading in _HEADER:
            drawn.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
        for verdict, *cells in _without_repeats(self.figures):
            drawn.add_row(f"[{_COLOURS[verdict.split()[0]]}]{verdict}[/]", *map(escape, cells))
        return drawn


def emit(report: Report, output: str) -> int:
    """Print a report and, where `output` names a file, write it there as Markdown; 1 if something failed."""
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(report.markdown())
    report.show()
    return int(report.failed)


def _without_repeats(figures: Sequence[Figure]) -> Iterator[tuple[str, ...]]:
    """The cells of each figure; a run is named on its first line alone."""
    before = ""
    for figure in figures:
        verdict, run, *rest = figure.cells()
        yield (verdict, "" if run == before else run, *rest)
        before = run


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3e}" if abs(value) >= 1e6 else f"{value:.6g}"
