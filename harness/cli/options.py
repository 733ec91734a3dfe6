"""The KEY=VALUE arguments of the commands that need no configuration of a run."""

from __future__ import annotations

from collections.abc import Sequence


def options_of(arguments: Sequence[str], defaults: dict[str, str]) -> dict[str, str]:
    """The options on the command line, without defaults.

    Raises: ValueError for an argument that is not KEY=VALUE with a key of `defaults`.
    """
    options: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in defaults or not value:
            raise ValueError(f"{argument} is unknown; expected KEY=VALUE with a key of {', '.join(defaults)}")
        options[key] = value
    return options
