"""Errors as one line each: what the user typed, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def one_line(error: BaseException) -> str:
    """The message of an error in one line; a bug keeps its class name and says how to see its traceback."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return message
    return f"{type(error).__name__}: {message}; HYDRA_FULL_ERROR=1 shows where"


def choices(word: str, names: Sequence[str]) -> str:
    """The name that `word` may have meant, and all names that are possible."""
    close = difflib.get_close_matches(word, names, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}expected one of: {', '.join(names) or 'no keys at all'}"
