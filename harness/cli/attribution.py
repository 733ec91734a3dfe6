"""Which linears, or blocks, cost most: the sensitivities of a run as a ranking, with errors that are cheap to compute.

    python -m harness attribution runs=FILE_OR_FOLDER [top=20]

For a folder, every finished run with analysis.sensitivity is shown. Markdown, or drawn on a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cli.options import options_of
from harness.reports import analysed, emit, ranking_sheet
from harness.runs import stale_ids

DEFAULTS = {"runs": "results/runs", "top": "20"}


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    try:
        options = DEFAULTS | options_of(arguments, DEFAULTS)
        if not options["top"].isdigit() or int(options["top"]) < 1:
            raise ValueError(f"top={options['top']} is no number of rows; expected 1 or more")
        records = analysed(Path(options["runs"]))
        stale = stale_ids(records)
        for record in records:
            emit(ranking_sheet(record, int(options["top"]), stale), "md", "")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
