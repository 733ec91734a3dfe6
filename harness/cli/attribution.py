"""Which linears, or blocks, cost most: `python -m harness attribution [KEY=VALUE ...]`.

The sensitivities of a run as a ranking, with errors that are cheap to compute. For a folder, every finished run with
analysis.sensitivity is shown. Markdown, or drawn on a terminal. `harness.cli.commands` describes the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.cli.commands import ATTRIBUTION, run_command
from harness.reports import analysed, emit, ranking_sheet
from harness.runs import stale_ids
from harness.utils.errors import Refusal


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0, or 1 with one line on stderr."""
    return run_command(ATTRIBUTION, arguments, _run)


def _run(options: dict[str, str]) -> None:
    if not options["top"].isdecimal() or int(options["top"]) < 1:
        raise Refusal(f"top={options['top']} is no number of rows; expected 1 or more")
    records = analysed(Path(options["runs"]))
    stale = stale_ids(records)
    for record in records:
        emit(ranking_sheet(record, int(options["top"]), stale), "md", "")
