"""Runs all cells, prints the table and writes it if `output` names a file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.families import models
from benchmarks.families.cells import METHODS, run
from benchmarks.families.table import render


def main(arguments: list[str]) -> int:
    """Run the cells that `arguments` (KEY=VALUE) name.

    Returns: the exit code, 1 if any cell is a bug or wrong in silence.
    """
    options = {"families": "", "methods": ",".join(METHODS), "bits": "8", "processes": "1", "output": "", "json": ""}
    options |= dict(argument.split("=", 1) for argument in arguments)
    families = options["families"].split(",") if options["families"] else models.families()
    cells = []
    for row in run(families, tuple(options["methods"].split(",")), int(options["bits"]), int(options["processes"])):
        print(row[0].family, *(f"{cell.method}={cell.outcome}" for cell in row), file=sys.stderr)
        bad = [line for cell in row if cell.outcome in ("BUG", "SILENT", "unbuilt") for line in cell.lines]
        for line in dict.fromkeys(bad):
            print(f"    {line}", file=sys.stderr)
        cells += row
    lines = list(render(cells, {} if options["families"] else models.left_out()))
    print("\n".join(lines))
    if options["output"]:
        Path(options["output"]).write_text("\n".join(lines) + "\n")
    if options["json"]:
        Path(options["json"]).write_text(json.dumps([asdict(cell) for cell in cells], indent=0))
    return int(any(cell.outcome in ("BUG", "SILENT") for cell in cells))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
