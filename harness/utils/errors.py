"""Error messages of one line: what the user typed, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def one_line(error: BaseException) -> str:
    """The message of an error in one line; for a bug, with the name of its class and how to see the traceback."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return message
    return f"{type(error).__name__}: {message}; HYDRA_FULL_ERROR=1 shows the traceback"


def choices(word: str, names: Sequence[str]) -> str:
    """The part of a message that lists all possible `names`, and first the one that is most similar to `word`."""
    close = difflib.get_close_matches(word, names, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}expected one of: {', '.join(names) or 'no keys at all'}"
