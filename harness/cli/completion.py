"""Completion in a shell: of commands and their options here, of runs by Hydra.

Hydra's script for a shell calls the program with `-sc query=SHELL`, and with the line in $COMP_LINE.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from harness.cli.commands import COMMANDS

_LINE = "COMP_LINE"


def words_of(arguments: Sequence[str]) -> list[str] | None:
    """How the last word of the line can be completed if its first word is a command; None for all other arguments."""
    if not is_query(arguments):
        return None
    typed = os.environ.get(_LINE, "").split(" ")
    words = [word for word in typed[:-1] if word][1:]
    while words and words[0] in ("-m", "harness"):  # python -m harness
        words = words[1:]
    if not words or words[0] not in COMMANDS:
        return None
    options = COMMANDS[words[0]].options
    key, equals, _ = typed[-1].partition("=")
    if equals:
        candidates = [f"{key}={choice}" for choice in options[key].choices] if key in options else []
    else:
        candidates = [f"{name}=" for name in options] + ["--help"]
    return [candidate for candidate in candidates if candidate.startswith(typed[-1])]


def is_query(arguments: Sequence[str]) -> bool:
    """Whether a shell calls the program to complete a line."""
    flags = {"-sc", "--shell-completion"}
    return bool(flags.intersection(arguments)) and any(word.startswith("query=") for word in arguments)


def first_words(line: str) -> list[str]:
    """The commands that can complete the only word of a line."""
    typed = line.split(" ")
    before = [word for word in typed[:-1] if word and word not in ("-m", "harness")]
    return [name for name in COMMANDS if len(before) == 1 and name.startswith(typed[-1])]
