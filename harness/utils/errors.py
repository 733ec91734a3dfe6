"""Error messages of one line: what the user typed, what was expected, and what to do."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

LIMIT = 200  # characters of a message
TRACEBACK = "PTQBENCH_TRACEBACK"  # environment variable that tells every process of a sweep to print tracebacks
_LISTED = 70  # characters of a list of choices
_SUGGESTED = 2


class Refusal(ValueError):  # noqa: N818 - it says what happens to the run
    """The configuration has a value that the run cannot have: there is nothing to record."""


class Conflict(Refusal):
    """Values of the configuration that are valid alone exclude each other, so other runs of a sweep may be possible."""


class UnknownKey(Refusal):
    """A key that the configuration does not have; `among` adds the keys of the whole configuration to the message."""

    def __init__(self, argument: str, names: Sequence[str]) -> None:
        self.argument = argument
        super().__init__(f"{short(argument)} is an unknown key; {expected_keys(argument, names)}")

    def among(self, keys: Sequence[str]) -> UnknownKey:
        """The same error, with suggestions from `keys`."""
        return UnknownKey(self.argument, keys)


def one_line(error: BaseException) -> str:
    """The message of an error in one line; for a bug, with the name of its class and how to see the traceback."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return message
    return f"{type(error).__name__}: {message}; HYDRA_FULL_ERROR=1 shows the traceback"


def trace() -> None:
    """Print the traceback of the error that is being handled, if HYDRA_FULL_ERROR=1 asks for it."""
    if os.environ.get(TRACEBACK, os.environ.get("HYDRA_FULL_ERROR", "")) not in ("", "0"):
        traceback.print_exc()


def choices(word: str, names: Sequence[str], see: str = "") -> str:
    """The part of a message that lists the possible `names`, and first the one that is most similar to `word`.

    A long list is cut; `see` says where all names are listed.
    """
    close = difflib.get_close_matches(word, names, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}expected one of: {_listed(names, see) or 'no keys at all'}"


def expected_keys(argument: str, keys: Sequence[str]) -> str:
    """The part of a message that names the keys most similar to that of `argument`, which is KEY or KEY=VALUE.

    Without a similar key, it lists the first part of each key.
    """
    similar = similar_keys(argument.partition("=")[0], keys)
    if similar:
        return f"did you mean {' or '.join(similar[:_SUGGESTED])}?"
    parent = argument.partition("=")[0].rpartition(".")[0]
    if parent in keys and not any(key.startswith(f"{parent}.") for key in keys):
        return f"{parent} has no keys"
    siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent]
    siblings = siblings or [key.partition(".")[0] for key in keys]
    return f"expected one of: {_listed(list(dict.fromkeys(siblings)), '--help') or 'no keys at all'}"


def similar_keys(word: str, keys: Iterable[str]) -> list[str]:
    """The full keys that a misspelt or shortened key `word` can mean, the most similar first.

    Keys with the same last part come first, then keys whose last part, or which as a whole, are similar.
    """
    parts = word.strip("+~").split(".")
    distinct = list(dict.fromkeys(keys))
    same = [key for key in distinct if key.split(".")[-1] == parts[-1]]
    same = same or [key for key in distinct if _contains(parts[-1], key.split(".")[-1])]
    if not same:
        lasts = {key.split(".")[-1] for key in distinct}
        close = difflib.get_close_matches(parts[-1], lasts, n=3, cutoff=0.7)
        same = [key for key in distinct if key.split(".")[-1] in close]
        same += difflib.get_close_matches(word, distinct, n=1, cutoff=0.8)
    ranked = sorted(dict.fromkeys(same), key=lambda key: (not _within(parts[:-1], key), -_ratio(word, key)))
    inside = [key for key in ranked if len(parts) > 1 and _within(parts[:-1], key)]
    return inside or ranked


def keys_of(cfg: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The full keys of a configuration, those of mappings and of the values in them, without Hydra's."""
    keys = []
    for name, value in cfg.items():
        if name != "_target_" and f"{prefix}{name}" != "hydra":
            keys.append(f"{prefix}{name}")
            keys += keys_of(value, f"{prefix}{name}.") if isinstance(value, Mapping) else []
    return keys


def short(text: object, limit: int = 70) -> str:
    """A text without its middle if it is longer than `limit` characters."""
    shown = " ".join(str(text).split())
    half = (limit - 3) // 2
    return shown if len(shown) <= limit else f"{shown[:half]}...{shown[-half:]}"


def _within(parts: Sequence[str], key: str) -> bool:
    """Whether all `parts` are parts of `key`, in this order."""
    rest = iter(key.split("."))
    return all(part in rest for part in parts)


def _contains(one: str, other: str) -> bool:
    """Whether one of two words of at least 4 letters contains the other."""
    return min(len(one), len(other)) >= 4 and (one in other or other in one)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _listed(names: Sequence[str], see: str) -> str:
    """The names, separated by commas; if the list is long, its beginning and the number of the others."""
    whole = ", ".join(names)
    if len(whole) <= _LISTED:
        return whole
    first: list[str] = []
    while len(", ".join([*first, names[len(first)]])) < _LISTED - 20:
        first.append(names[len(first)])
    return f"{', '.join(first)}, and {len(names) - len(first)} more{f' ({see} lists all)' if see else ''}"
