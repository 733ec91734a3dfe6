"""The words of the command line of a run, in the order that Hydra reads: flags first, then KEY=VALUE arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise

from hydra._internal.utils import get_args_parser

from harness.cli.commands import COMMANDS
from harness.cli.hydra_errors import quoted
from harness.utils.errors import Refusal, choices, short


def ordered(words: Sequence[str]) -> list[str]:
    """The words with all flags in front; Hydra reads no KEY=VALUE argument that follows a flag behind another one.

    Raises: Refusal for an unknown flag, a flag without its value, and a word that is neither.
    """
    parser = get_args_parser()
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    front: list[str] = []
    behind: list[str] = []
    rest = list(words)
    for key, sign in pairwise(words):
        if sign.startswith("=") and "=" not in key:
            raise Refusal(
                f"{short(key)} {short(sign)} has a space; expected {short(key)}=VALUE, without spaces around ="
            )
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            behind.append(_checked(word))
            continue
        name, equals, value = word.partition("=")
        action = flags.get(name) or _shortened(name, flags)
        if action is None:
            raise Refusal(_unknown_flag(word, list(flags)))
        front += _flag(name, value if equals else None, action, rest)
    return front + behind


def _flag(name: str, value: str | None, action: argparse.Action, rest: list[str]) -> list[str]:
    """One flag with its value, which is taken from the `rest` of the words where it does not follow a =."""
    if action.nargs == 0:
        if value is not None:
            raise Refusal(f"{name}={value}: {name} has no value; expected {name}")
        return [name]
    optional = action.nargs == "?"
    if value is None and rest and not rest[0].startswith("-") and not ("=" in rest[0] and (optional or action.choices)):
        value = rest.pop(0)
    if value is None and not optional:
        raise Refusal(f"{name} has no value; expected {name}={_values(action)}")
    if action.choices is not None and value is not None and value not in action.choices:
        raise Refusal(f"{name}={value} is unknown; {choices(value, list(action.choices))}")
    long = next(flag for flag in action.option_strings if flag.startswith("--"))
    return [long] if value is None and not optional else [f"{long}={value or action.const}"]


def _values(action: argparse.Action) -> str:
    return "|".join(map(str, action.choices)) if action.choices else "VALUE"


def _shortened(name: str, flags: dict[str, argparse.Action]) -> argparse.Action | None:
    """The flag that begins with `name`, if there is only one."""
    matching = {id(flags[flag]): flags[flag] for flag in flags if name.startswith("--") and flag.startswith(name)}
    return next(iter(matching.values())) if len(matching) == 1 else None


def _unknown_flag(word: str, flags: Sequence[str]) -> str:
    name, equals, value = word.partition("=")
    long = [flag for flag in flags if flag.startswith("--")]
    meant = f"expected {quoted_if_needed(name.lstrip('-'), value)}, without -" if equals else ""
    return f"{short(word)} is an unknown flag; " + (meant or choices(name, long, "--help"))


def quoted_if_needed(key: str, value: str) -> str:
    """KEY=VALUE, quoted for the shell and for Hydra where the value has other signs than those of names and paths."""
    return f"{key}={value}" if re.fullmatch(r"[\w./,:*-]*", value, re.ASCII) else quoted(key, short(value))


def _checked(word: str) -> str:
    """The word if it can be an override: KEY=VALUE, ~KEY.

    Raises: Refusal, with the command or the key that may be meant.
    """
    if "=" in word or word.startswith("~"):
        if word.startswith("="):
            raise Refusal(f"{short(word)} has no key; expected KEY=VALUE, without spaces around =")
        return word
    if word in COMMANDS:
        raise Refusal(f"{word} is a command, which is the first word: python -m harness {word} KEY=VALUE ...")
    raise Refusal(f"{short(word)} is neither a command nor KEY=VALUE; {choices(word, list(COMMANDS))}, or KEY=VALUE")
