"""Markdown: the one writer of tables, and texts with parts that are generated between two marks."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

WIDTH = 120  # of paragraphs


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = (), pad: bool = True
) -> str:
    """A table in Markdown; columns of `numbers`, by heading, are aligned right, and cells padded to one width."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) if pad else 0 for i in range(len(headings))]
    right = [heading in numbers for heading in headings]
    rule = [_rule(width, is_number) for width, is_number in zip(widths, right, strict=True)]
    lines = [[_aligned(*cell) for cell in zip(row, widths, right, strict=True)] for row in cells]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paragraph(text: str) -> str:
    """A text in lines of at most 120 characters, which Markdown joins again."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def between(text: str, mark: str = "table") -> tuple[str, str, str]:
    """The text before the marked part, the part, and the text after it; the marks are not in the part.

    Raises: ValueError if the text lacks the marks.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"lacks the lines {begin} and {end}; add them where the table belongs")
    head, _, rest = text.partition(begin)
    part, _, tail = rest.partition(end)
    return head + begin, part, end + tail


def write_into(path: Path, part: str, mark: str = "table") -> None:
    """Replace the marked part of a Markdown file.

    Raises: ValueError if the file lacks the marks.
    """
    try:
        head, _, tail = between(path.read_text() if path.is_file() else "", mark)
    except ValueError as error:
        raise ValueError(f"into={path} {error}") from error
    path.write_text(f"{head}\n{part.strip()}\n{tail}")


def _rule(width: int, is_number: bool) -> str:
    return "-" * max(2, width - 1) + (":" if is_number else "-")


def _aligned(cell: str, width: int, is_number: bool) -> str:
    return cell.rjust(width) if is_number else cell.ljust(width)
