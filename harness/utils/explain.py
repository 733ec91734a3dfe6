"""One line about what is wrong with the value of a key, of limited length, also for long paths and long reasons."""

from __future__ import annotations

import re

import torch

from harness.utils.errors import LIMIT, short

_LEAST, _MOST = 45, 70  # characters of a long key with its value: more if the detail is short
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class OneLineError(ValueError):
    """A ValueError whose message is complete: no caller adds to it."""


def explain(subject: str, problem: str, detail: str, remedy: str) -> OneLineError:
    """The error `subject problem (detail); remedy`, of at most `LIMIT` characters.

    A long `subject`, such as a key with a path, loses characters in its middle, and a long `detail` those at its end.
    """
    detail = " ".join(_COLOURS.sub("", detail).split()).rstrip(".")
    room = LIMIT - len(f" {problem} (); {remedy}")
    subject = short(subject, min(max(room - len(detail), _LEAST), _MOST))
    detail = cut(detail, max(room - len(subject), 0))
    return OneLineError(f"{subject} {problem}{f' ({detail})' if detail else ''}; {remedy}")


def reason(error: BaseException, length: int = LIMIT) -> str:
    """What an exception of a library says in one line of at most `length` characters.

    The names of classes are left out, unless the message alone says little.
    """
    message = " ".join(str(error).split()).rpartition("Error: ")[2]
    named = f"{type(error).__name__}: {message}".removesuffix(": ")
    return cut(message if len(message.split()) > 2 else named, length)


def is_memory(error: BaseException) -> bool:
    """Whether the machine had too little memory; the CPU allocator of torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def fitted(start: str, text: str, end: str) -> str:
    """The three texts as one message of at most `LIMIT` characters: a long `text` loses those at its end."""
    return f"{start}{cut(text, LIMIT - len(start) - len(end))}{end}"


def cut(text: str, length: int) -> str:
    """`text` with at most `length` characters: the end of a longer one is replaced by three points."""
    return text if len(text) <= length else f"{text[: max(length - 3, 0)]}..."[:length]
