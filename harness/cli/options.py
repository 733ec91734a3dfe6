"""KEY=VALUE arguments, as the smaller commands take them: those that need no configuration."""

from __future__ import annotations

from collections.abc import Sequence


def options_of(arguments: Sequence[str], defaults: dict[str, str]) -> dict[str, str]:
    """The options that were given, without those that were not.

    Raises: ValueError for a key that is not among `defaults`.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in defaults or not value:
            raise ValueError(f"{argument} is unknown; expected KEY=VALUE with a key of {', '.join(defaults)}")
        given[key] = value
    return given
