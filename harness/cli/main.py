"""The command that the first word names, or a run or sweep if the first word is none of them."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.commands import COMMANDS as COMMANDS
from harness.cli.commands import HELP, help_of, print_error
from harness.cli.completion import words_of
from harness.utils.errors import Refusal
from harness.utils.spinning import limit_spinning


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of `arguments`, by default the arguments of the process; returns its exit code.

    An interruption while a command is still being imported is one line too.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries; tqdm reads this once, when it is imported
    limit_spinning()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except Refusal as error:
        print_error(error)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the end of the process
        print_error("interrupted; finished runs are kept and will be skipped next time")
        return 130


def conf_folder() -> Path:
    """The folder of the configuration: harness/conf in a wheel, conf/ next to harness/ in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _dispatch(words: list[str]) -> int:
    plain = [word for word in words if word not in HELP]
    name = plain[0] if plain else ""
    if name in COMMANDS:
        if len(plain) < len(words):
            sys.stdout.write(help_of(COMMANDS[name]))
            return 0
        module = importlib.import_module(f"harness.cli.{name}")
        code: int = module.main(plain[1:])
        return code
    suggestions = words_of(words)
    if suggestions is not None:  # the shell asks how to complete the words of a command
        sys.stdout.write(" ".join(suggestions) + "\n")
        return 0
    from harness.cli.start import start

    _find_methods_here()
    return start(words)


def _find_methods_here() -> None:
    """Let the script `ptqbench` import methods from the current folder, as `python -m harness` does."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
