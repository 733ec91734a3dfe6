"""Starts runs and sweeps through Hydra; help, --cfg and completion need no other library and are fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import hydra
from omegaconf import DictConfig

from harness import __version__
from harness.cli.arguments import ordered
from harness.cli.commands import print_error
from harness.cli.completion import first_words, is_query
from harness.cli.hydra_errors import one_line
from harness.cli.main import conf_folder
from harness.utils.errors import TRACEBACK, Refusal

ended: list[str] = []  # status of each run, for the exit code: Hydra does not return results of runs
on_interrupt: list[Callable[[], None]] = []  # what the sweep in progress removes if it is interrupted


class Stop(BaseException):
    """Ends a sweep before its first run. Hydra turns every Exception of a callback into a warning."""


def start(words: Sequence[str]) -> int:
    """Start the runs of the command line and print their table.

    Returns: the exit code: 0 if all runs finished without an error, otherwise 1. After --help, Hydra ends the process.
    """
    if "--version" in words:
        sys.stdout.write(f"ptqbench {__version__}\n")
        return 0
    show_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    os.environ[TRACEBACK] = "1" if show_traceback else ""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing
    ended.clear()
    on_interrupt.clear()
    try:
        sys.argv[1:] = ordered(words)
        _order_line(words)
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except Stop as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        for remove in on_interrupt:
            remove()
        raise
    except Exception as error:  # runs catch their errors, so the command line cannot be used
        if show_traceback and not isinstance(error, Refusal):
            raise
        print_error(one_line(error, tuple(words)))
        return 1
    return 1 if "failed" in ended else 0


def job(cfg: DictConfig) -> list[float] | None:
    """One run: Hydra's launchers call this function, in this process or in another."""
    from harness.cli.run import job as run

    return run(cfg)


def _order_line(words: Sequence[str]) -> None:
    """Put the flags in $COMP_LINE, the line that a shell wants to complete, in front too."""
    line = os.environ.get("COMP_LINE", "")
    if not is_query(words):
        return
    if names := first_words(line):
        sys.stdout.write(" ".join(names) + " ")
    program, *typed = line.split(" ")
    last = typed.pop() if typed else ""
    try:
        os.environ["COMP_LINE"] = " ".join(
            [program, *ordered([word for word in typed if (word and "=" in word) or word.startswith("-")]), last]
        )
    except Refusal:  # an unfinished flag: complete what Hydra can
        return
