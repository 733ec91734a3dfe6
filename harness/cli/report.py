"""Write the report of a folder of records.

    python -m harness.report [runs=FOLDER] [output=FILE] [png=FILE]

`output` is RUNS/report.html where it is not given; `png` writes the plot of perplexity against bits per weight too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from harness.cli.options import options_of
from harness.reports.frame import load_some

DEFAULTS = {"runs": "results/runs", "output": "", "png": ""}
EXTRA = {"altair": "altair", "vl_convert": "vl-convert-python", "itables": "itables", "jinja2": "jinja2"}


def main(arguments: Sequence[str]) -> int:
    """The command line; 0, or 1 with one line on stderr."""
    try:
        options = DEFAULTS | options_of(arguments, DEFAULTS)
        _require_extra()
        _write(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _write(options: dict[str, str]) -> None:
    from harness.reports.html import page  # imports what the extra installs

    records = load_some(Path(options["runs"]))
    if options["png"]:
        target = Path(options["png"])
        target.write_bytes(page.png(records))
        sys.stdout.write(f"{target}\n")
    target = Path(options["output"] or Path(options["runs"]) / "report.html")
    target.write_text(page.html(records, Path(options["runs"])), encoding="utf-8")
    sys.stdout.write(f"{target}\n")


def _require_extra() -> None:
    """Raises: ValueError if a package of the extra is not installed."""
    missing = [package for module, package in EXTRA.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"the report needs {', '.join(missing)}, not installed here; run pip install ptqbench[report]")
