"""Where the time of a folder's sweeps went, as a table: one row for each sweep."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from harness.records import sweep
from harness.reports.render import Sheet

_COUNTS = ("runs", "ok", "failed", "skipped")
_STAGES = ("load", "data", "other", *sweep.WORK)
_HEAD = "seconds of each stage, all runs together; own share: that of load, data and other (processes, records)"


def sweeps_sheet(folder: Path, only: Collection[str] = (), title: str = "") -> Sheet:
    """The sheet of the summaries that sweeps left in a folder of records: of all, or of those named `only`.

    Raises: ValueError if there are none.
    """
    summaries = {path.stem: summary for path, summary in sweep.summaries(folder).items()}
    rows = [{"sweep": name} | _row(summary) for name, summary in summaries.items() if not only or name in only]
    if not rows:
        raise ValueError(f"runs={folder} holds no summary of a sweep; expected a folder that a sweep has written to")
    frame = pd.DataFrame(rows)
    shown = pd.DataFrame({"sweep": frame["sweep"]})
    for name in _COUNTS:
        shown[name] = frame[name].astype(str)
    for name in ("wall", *_STAGES):
        if frame[name].any():
            shown[name] = [f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}" for seconds in frame[name]]
    shown["own share"] = [f"{share:.1%}" for share in frame["own_share"]]
    figures = [*_COUNTS, "wall", *_STAGES, "own share"]
    return Sheet(frame, shown, [line for line in (title, _HEAD) if line], [], figures)


def _row(summary: sweep.Json) -> dict[str, float]:
    seconds = {name: summary["stages"].get(name, 0.0) for name in _STAGES}
    counts = {name: summary[name] for name in _COUNTS}
    return counts | {"wall": summary["wall_s"]} | seconds | {"own_share": summary["own_share"]}
