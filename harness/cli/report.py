"""Write the HTML report of a folder of records.

    python -m harness report [runs=FOLDER] [table=NAME] [output=FILE] [png=FILE]

`table` names a table of FOLDER/tables.yaml: the report is then about its runs only. `output` is RUNS/report.html by
default; `png` also writes the plot of perplexity against bits per weight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from harness.cli.options import options_of
from harness.records.folder import load_some, select, table_of
from harness.runs import stale_ids

DEFAULTS = {"runs": "results/runs", "table": "", "output": "", "png": ""}
EXTRA = {"altair": "altair", "vl_convert": "vl-convert-python", "itables": "itables", "jinja2": "jinja2"}


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    try:
        options = DEFAULTS | options_of(arguments, DEFAULTS)
        _require_extra()
        _write(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _write(options: dict[str, str]) -> None:
    from harness.reports.html import page  # imports the libraries of the extra

    folder = Path(options["runs"])
    records = load_some(folder)
    if options["table"]:
        records = select(records, table_of(folder, options["table"]), folder)
    if options["png"]:
        target = Path(options["png"])
        target.write_bytes(page.png(records))
        sys.stdout.write(f"{target}\n")
    target = Path(options["output"] or folder / "report.html")
    target.write_text(page.html(records, folder, stale_ids(records)), encoding="utf-8")
    sys.stdout.write(f"{target}\n")


def _require_extra() -> None:
    """Raises: ValueError if a package of the extra is not installed."""
    missing = [package for module, package in EXTRA.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"the report needs {', '.join(missing)}, not installed here; run pip install ptqbench[report]")
