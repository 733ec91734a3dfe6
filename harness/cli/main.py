"""The command that the first word names, or a run or sweep if the first word is none of them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

COMMANDS = ("table", "report", "reproduce", "attribution")
_HELP = {"--help", "-h"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of `arguments`, by default the arguments of the process; returns its exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries; tqdm reads this once, when it is imported
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return _command(importlib.import_module(f"harness.cli.{words[0]}"), words[1:])
    from harness.cli.run import main as run

    _find_methods_here()
    return run()


def conf_folder() -> Path:
    """The folder of the configuration: harness/conf in a wheel, conf/ next to harness/ in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def _command(module: ModuleType, arguments: Sequence[str]) -> int:
    """Run the command of `module`, or print the module's docstring if help is requested."""
    if _HELP & set(arguments):
        sys.stdout.write(inspect.cleandoc(module.__doc__ or "") + "\n")
        return 0
    code: int = module.main(arguments)
    return code


def _find_methods_here() -> None:
    """Let the script `ptqbench` import methods from the current folder, as `python -m harness` does."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
