"""Where the time of a folder's sweeps went, as a table: one row a sweep."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.records import sweep
from harness.reports.render import Sheet

_COUNTS = ("runs", "ok", "failed", "skipped")
_STAGES = ("load", "data", "other", *sweep.WORK)
_HEAD = "seconds of each stage, all runs together; load, data and other (processes, records) are the harness's own"


def sweeps_sheet(folder: Path) -> Sheet:
    """The sheet of the summaries that sweeps have left in a folder of records.

    Raises: ValueError if there are none.
    """
    found = {path.stem: summary for path, summary in sweep.summaries(folder).items()}
    if not found:
        raise ValueError(f"runs={folder} holds no summary of a sweep; expected a folder that a sweep has written to")
    frame = pd.DataFrame([{"sweep": name} | _row(summary) for name, summary in found.items()])
    shown = pd.DataFrame({"sweep": frame["sweep"]})
    for name in _COUNTS:
        shown[name] = frame[name].astype(str)
    for name in ("wall", *_STAGES):
        if frame[name].any():
            shown[name] = [f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}" for seconds in frame[name]]
    shown["own share"] = [f"{share:.1%}" for share in frame["own_share"]]
    return Sheet(frame, shown, _HEAD, [], ["wall", *_STAGES, "own share"])


def _row(summary: sweep.Json) -> dict[str, float]:
    seconds = {name: summary["stages"].get(name, 0.0) for name in _STAGES}
    return (
        {name: summary[name] for name in _COUNTS}
        | {"wall": summary["wall_s"]}
        | seconds
        | {"own_share": summary["own_share"]}
    )
