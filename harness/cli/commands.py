"""The commands other than runs: their options with choices and defaults.

Help, checks and completion follow from them.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.utils.errors import Refusal, choices, short

HELP = frozenset(("--help", "-h"))
WIDTH = 100


@dataclass(frozen=True)
class Option:
    """A KEY=VALUE argument of a command: its meaning, its default (empty: none), and its choices if it has any."""

    meaning: str
    default: str = ""
    choices: Sequence[str] = ()


@dataclass(frozen=True)
class Command:
    """A command: the first word of the command line, one sentence on it, and its options.

    apart  pairs of options of which one would have no effect
    notes  further paragraphs of its help
    """

    name: str
    summary: str
    options: Mapping[str, Option]
    apart: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=tuple)


TABLE = Command(
    "table",
    "Tables of records, or the differences between two folders of them.",
    {
        "runs": Option("folder of records", "results/runs"),
        "table": Option("name of a table in RUNS/tables.yaml, which lists the rows and columns of each"),
        "compare": Option("OLD,NEW: the differences between two folders, or two records, instead of a table"),
        "show": Option(
            "runs (default), where the time of sweeps went, or sizes of KV caches", "", ("runs", "sweeps", "kv")
        ),
        "columns": Option(
            "the short set of columns (default), quality with its intervals, or all", "", ("short", "quality", "all")
        ),
        "failed": Option(
            "rows of failed runs: show them, hide them, or show only them", "show", ("show", "hide", "list")
        ),
        "stale": Option(
            "results of other code than today's: mark, hide or list them", "mark", ("mark", "hide", "list")
        ),
        "seeds": Option("mean: one row for runs that differ only in their seed", "all", ("all", "mean")),
        "format": Option(
            "format of the output; CSV and Parquet have every column", "md", ("md", "csv", "parquet", "latex")
        ),
        "output": Option("file that is written; without it, the terminal (Parquet: RUNS/table.parquet)"),
        "into": Option("Markdown file in which the part between <!-- NAME:begin --> and <!-- NAME:end --> is replaced"),
        "mark": Option("NAME for into=; without it, that of the table"),
    },
    (
        *(("compare", other) for other in ("runs", "into", "show", "table", "columns", "stale", "failed")),
        ("table", "show"),
        ("into", "format"),
        ("into", "output"),
    ),
    ("Figures are shown with their ratio to the float baseline.",),
)
REPORT = Command(
    "report",
    "One HTML page with all runs in tables and plots; it opens without a network.",
    {
        "runs": Option("folder of records", "results/runs"),
        "table": Option("name of a table in RUNS/tables.yaml: a report of its runs only"),
        "output": Option("file that is written; without it, RUNS/report.html"),
        "png": Option("file for the plot of perplexity against bits per weight, in addition"),
    },
)
REPRODUCE = Command(
    "reproduce",
    "Run committed records again, or compare records with published tables: PASS or FAIL for each figure.",
    {
        "runs": Option("folder of records", "results/reference"),
        "into": Option(
            "folder of the reruns; finished ones are kept, so that a reproduction continues", "results/reproduced"
        ),
        "published": Option("CSV file of published figures to compare with; nothing is run"),
        "only": Option("part of a run's name or id, may contain *: only these runs"),
        "output": Option("file of the report; without it, the terminal"),
    },
    notes=(
        "If only the code has changed and the results are the same bits, the record gets the code of the rerun, and "
        "tables no longer mark it.",
    ),
)
ATTRIBUTION = Command(
    "attribution",
    "Which linears or blocks cost most: the sensitivities of runs with analysis.sensitivity, as a ranking.",
    {
        "runs": Option("record, or folder of records", "results/runs"),
        "top": Option("number of rows", "20"),
    },
)
COMMANDS = {command.name: command for command in (TABLE, REPORT, REPRODUCE, ATTRIBUTION)}


def print_error(message: object) -> None:
    """Print an error to stderr, in one line."""
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")


def run_command(command: Command, arguments: Sequence[str], work: Callable[[dict[str, str]], int | None]) -> int:
    """Call `work` with the options of the command line, defaults included, or print the help if it is requested.

    Returns: the exit code: that of `work`, 1 after an error and 130 after an interruption; both are one line.
    """
    if HELP.intersection(arguments):
        sys.stdout.write(help_of(command))
        return 0
    try:
        typed = options_of(command, arguments)
        return work({key: option.default for key, option in command.options.items()} | typed) or 0
    except (ValueError, OSError) as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print_error("interrupted; finished runs are kept and will not be run again")
        return 130


def options_of(command: Command, arguments: Sequence[str]) -> dict[str, str]:
    """The options on the command line, without defaults.

    Raises: Refusal for an argument that is not KEY=VALUE with a key and a value of the command, and for options that
    exclude each other.
    """
    typed: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in command.options:
            raise Refusal(_unknown(command, argument))
        if not equals or not value:
            raise Refusal(f"{argument} has no value; expected {key}={_values(command.options[key])}")
        if key in typed and typed[key] != value:
            raise Refusal(f"{argument} follows {key}={typed[key]}; expected it once")
        allowed = command.options[key].choices
        if allowed and value not in allowed:
            raise Refusal(f"{short(argument)} is unknown; {choices(value, allowed)}")
        typed[key] = value
    for one, other in command.apart:
        if one in typed and other in typed:
            raise Refusal(f"{other}={typed[other]} means nothing with {one}={typed[one]}; drop one of them")
    return typed


def file_of(key: str, name: str) -> Path:
    """The file that option `key` names, to be written.

    Raises: Refusal if its folder does not exist, or if it is a folder.
    """
    path = Path(name)
    if path.is_dir():
        raise Refusal(f"{key}={short(name)} is a folder; expected a file in it")
    if not path.parent.is_dir():
        raise Refusal(f"{key}={short(name)}: folder {short(path.parent)} does not exist; create it, or name another")
    return path


def help_of(command: Command) -> str:
    """The help of a command: what it does, and a line or two for each option."""
    lines = [*_wrapped(command.summary), "", f"    python -m harness {command.name} [KEY=VALUE ...]", ""]
    for key, option in command.options.items():
        default = f" (default: {option.default})" if option.default else ""
        lines += _wrapped(f"  {key}={_values(option)}", "")
        lines += _wrapped(f"{option.meaning}{default}", "      ")
    for note in command.notes:
        lines += ["", *_wrapped(note)]
    return "\n".join(lines) + "\n"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, drop_whitespace=True) or [text]


def _values(option: Option) -> str:
    return "|".join(option.choices) or "VALUE"


def _unknown(command: Command, argument: str) -> str:
    key, _, value = argument.lstrip("-").partition("=")
    names = list(command.options)
    if key in names:
        return f"{argument} is no flag; expected {key}={value or _values(command.options[key])}"
    owner = next((name for name, option in command.options.items() if key in option.choices and not value), None)
    if owner is not None:
        return f"{argument} is unknown; did you mean {owner}={key}?"
    return f"{short(argument)} is unknown; {choices(key, names, '--help')}"
