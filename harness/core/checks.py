"""Range checks of options, shared by configuration classes and methods, with one-line errors."""

from __future__ import annotations


def at_least(owner: object, low: int, *keys: str) -> None:
    """Raises: ValueError if an attribute of `owner` is less than `low`, or NaN."""
    for key in keys:
        if not getattr(owner, key) >= low:
            raise ValueError(f"{key}={getattr(owner, key)} is out of range; expected {low} or more")


def above_zero(owner: object, *keys: str) -> None:
    """Raises: ValueError if an attribute of `owner` is 0, negative or NaN."""
    for key in keys:
        if not getattr(owner, key) > 0:
            raise ValueError(f"{key}={getattr(owner, key)} is out of range; expected more than 0")
