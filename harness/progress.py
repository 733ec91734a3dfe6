"""The progress of long work, as a function that the work is given: nothing below run.py knows of a terminal."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Iterate over `items` while showing `label` and how far along it is."""

    def __call__(self, items: Iterable[T], label: str, total: int | None = None) -> Generator[T, None, None]: ...


def silent(items: Iterable[T], label: str, total: int | None = None) -> Generator[T, None, None]:
    """A Track that shows nothing."""
    yield from items
