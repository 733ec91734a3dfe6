"""The table of cells as text: a row for each family, the counts, and every distinct message with its families."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from benchmarks.families.cells import Cell

_SECTIONS = {
    "BUG": "Bugs: errors that are not one clear line",
    "SILENT": "Wrong in silence: runs that are ok but differ from the checks",
    "refused": "Refusals",
    "warned": "Warnings",
    "unbuilt": "Models that transformers did not build",
}


def render(cells: Sequence[Cell], left_out: dict[str, str]) -> Iterator[str]:
    """The lines of the table in Markdown."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    outcomes = {(cell.family, cell.method): cell.outcome for cell in cells}
    families = list(dict.fromkeys(cell.family for cell in cells))
    yield from counts(cells)
    yield from ("", f"| family | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|")
    for family in families:
        yield f"| {family} | {' | '.join(outcomes[family, method] for method in methods)} |"
    for outcome, title in _SECTIONS.items():
        groups = distinct([cell for cell in cells if cell.outcome == outcome])
        if groups:
            yield from ("", f"## {title}", "")
            yield from (f"- `{message}`: {where}" for message, where in groups.items())
    if left_out:
        yield from ("", "## Families that are left out", "")
        yield from (f"- {family}: {reason}" for family, reason in left_out.items())


def counts(cells: Sequence[Cell]) -> Iterator[str]:
    """The number of families and of cells, and the number of cells with each outcome."""
    number = Counter[str](cell.outcome for cell in cells)
    yield f"{len({cell.family for cell in cells})} families, {len(cells)} cells: " + ", ".join(
        f"{number[outcome]} {outcome}" for outcome in dict.fromkeys(("ok", "warned", *_SECTIONS)) if outcome in number
    )


def distinct(cells: Sequence[Cell]) -> dict[str, str]:
    """Each distinct message, with its families and methods; most cells first.

    Messages that differ only in numbers and names of the family and its classes are one; the first is shown.
    """
    groups: dict[str, list[tuple[str, Cell]]] = defaultdict(list)
    for cell in cells:
        for line in cell.lines:
            key = re.sub(rf"\b{re.escape(cell.family)}\b", "FAMILY", line)
            key = re.sub(r"\b[A-Z]\w+(Model|LM|Generation|Output|Decoder)\b", "CLASS", key)
            key = re.sub(r"\d[\d.e+-]*", "#", key)
            groups[key].append((line, cell))
    ordered = sorted(groups.values(), key=len, reverse=True)
    return {members[0][0]: _where([cell for _, cell in members]) for members in ordered}


def _where(cells: Sequence[Cell]) -> str:
    methods: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        methods[cell.family] += [cell.method] if cell.method not in methods[cell.family] else []
    same: dict[str, list[str]] = defaultdict(list)
    for family, names in methods.items():
        same[", ".join(names)].append(family)
    return "; ".join(f"{', '.join(families)} ({names})" for names, families in same.items())
