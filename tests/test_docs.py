"""The documents: short where they must be, links that resolve, and every generated table in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 12_000


def test_the_first_screen_of_readme_has_commands_table_and_plot() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:45])
    for part in ("make bench", "make test", "<!-- table:begin -->", "<!-- table:end -->", "](results/pareto.png)"):
        assert part in first, part


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", document.read_text()):
        if target.startswith("http"):
            continue
        path = document.parent / target if target else document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), f"{target}{anchor}"


def test_a_generated_table_stands_in_one_document() -> None:
    marks = [mark for path in DOCUMENTS for mark in re.findall(r"<!-- (\w+):begin -->", path.read_text())]
    assert len(marks) > 5
    assert len(set(marks)) == len(marks)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
