"""Writes the HTML report of a folder of records: `python -m harness report [KEY=VALUE ...]`.

`harness.cli.commands` describes the options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from harness.cli.commands import REPORT, file_of, run_command
from harness.records.folder import load_some, select, table_of
from harness.runs import stale_ids

EXTRA = {"altair": "altair", "vl_convert": "vl-convert-python", "itables": "itables", "jinja2": "jinja2"}


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    return run_command(REPORT, arguments, _run)


def _run(options: dict[str, str]) -> None:
    _require_extra()
    _write(options)


def _write(options: dict[str, str]) -> None:
    from harness.reports.html import page  # imports the libraries of the extra

    folder = Path(options["runs"])
    records = load_some(folder)
    if options["table"]:
        records = select(records, table_of(folder, options["table"]), folder)
    picture = file_of("png", options["png"]) if options["png"] else None
    target = file_of("output", options["output"] or str(folder / "report.html"))
    if picture is not None:
        picture.write_bytes(page.png(records))
        sys.stdout.write(f"{picture}\n")
    target.write_text(page.html(records, folder, stale_ids(records)), encoding="utf-8")
    sys.stdout.write(f"{target}\n")


def _require_extra() -> None:
    """Raises: ValueError if a package of the extra is not installed."""
    missing = [package for module, package in EXTRA.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"the report needs {', '.join(missing)}, not installed here; run pip install ptqbench[report]")
