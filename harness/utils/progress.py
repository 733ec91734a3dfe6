"""The progress of long work, as a function that the work is given: nothing below run.py knows of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")
Label = str | Callable[[], str]


def text(label: Label) -> str:
    """What a label says by now."""
    return label if isinstance(label, str) else label()


class Track(Protocol):
    """Iterate over `items` while showing how far along it is, and `label`: a function is asked after each item."""

    def __call__(self, items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]: ...


def silent(items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]:
    """A Track that shows nothing."""
    yield from items
