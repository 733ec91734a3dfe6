"""Which command the first word means; without one, a run or a sweep."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = ("table", "report", "reproduce", "attribution")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` name, by default those of the process; returns its exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries; tqdm reads this once, when it is imported
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        command = importlib.import_module(f"harness.cli.{words[0]}")
        code: int = command.main(words[1:])
        return code
    from harness.cli.run import main as run

    return run()
