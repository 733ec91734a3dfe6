"""Progress of long work, shown by a function that is passed to it: only `cli` writes to a terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")
Label = str | Callable[[], str]


def text(label: Label) -> str:
    """The text of a label; a label that is a function is called for it."""
    return label if isinstance(label, str) else label()


class Track(Protocol):
    """Iterates over `items` and shows the progress with `label`; a label that is a function is called after each item.

    total  number of items, if it is known
    """

    def __call__(self, items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]: ...


def silent(items: Iterable[T], label: Label, total: int | None = None) -> Generator[T, None, None]:
    """A Track without output."""
    yield from items
