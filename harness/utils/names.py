"""Names of modules and parameters."""

from __future__ import annotations


def kind_of(name: str) -> str:
    """The name of a module or parameter with `*` for each number: that of all its siblings in other blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
