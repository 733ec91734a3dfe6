"""The log of a sweep: an entry for each run, written by the process of the run, and a summary of where time went."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.records.record import Record
from harness.utils.files import replacing

Json = dict[str, Any]

# Stages of forward passes and of the method; all other time is overhead of the harness.
WORK = ("allocate", "quantize", "analyse", "evaluate", "divergence", "measure")
_SUFFIX = ".run.json"


@dataclass(frozen=True)
class Entry:
    """One run of a sweep.

    number   position in the sweep, from 0
    run_id   None if the configuration could not be read
    status   ok or failed, see `outcome`
    wall_s   seconds from the start of the run to its record, the start of its process included
    skipped  whether the run had finished before
    refused  whether its configuration does not allow it
    stages   seconds of each stage, from the record; empty for a skipped run
    """

    number: int
    run_id: str | None
    status: str
    wall_s: float
    skipped: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    refused: bool = False

    @property
    def work_s(self) -> float:
        """Seconds of forward passes and of the method, without overhead."""
        return math.fsum(self.stages.get(name, 0.0) for name in WORK)


def outcome(record: Record, skipped: bool) -> str:
    """ok or failed: a run whose model was not saved has results, but not all that was asked for."""
    return "failed" if record.unsaved and not skipped else record.status


def entry_of(number: int, record: Record, skipped: bool, wall_s: float) -> Entry:
    """The entry of a run; a skipped run spent no time in stages."""
    stages = {} if skipped else record.stages
    return Entry(number, record.run_id, outcome(record, skipped), wall_s, skipped, stages, record.refused)


def note(folder: Path, entry: Entry) -> None:
    """Write an entry into the folder of a sweep, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{entry.number:05d}{_SUFFIX}") as part:
        part.write_text(json.dumps(asdict(entry)))


def entries(folder: Path) -> list[Entry]:
    """All entries of a sweep, in the order of its runs."""
    return [Entry(**json.loads(path.read_text())) for path in sorted(folder.glob(f"*{_SUFFIX}"))]


def summary(runs: Sequence[Entry], wall_s: float) -> Json:
    """Where the `wall_s` seconds of a sweep went: seconds of each stage, and the overhead of the harness.

    Overhead (`own_s`) is everything except forward passes and the method: loading, text, processes, records, waiting.
    The times of runs that execute in parallel are added, and `own_share` is the share of overhead in this sum.
    """
    stages: dict[str, float] = {}
    for entry in runs:
        for name, seconds in entry.stages.items():
            stages[name] = stages.get(name, 0.0) + seconds
    runs_s, work_s = (math.fsum(getattr(entry, name) for entry in runs) for name in ("wall_s", "work_s"))
    overhead_s = runs_s - work_s + max(0.0, wall_s - runs_s)
    stages["other"] = max(0.0, runs_s - math.fsum(stages.values())) + max(0.0, wall_s - runs_s)
    counts = {name: sum(entry.status == name for entry in runs) for name in ("ok", "failed")}
    return {
        "runs": len(runs),
        **counts,
        "skipped": sum(entry.skipped for entry in runs),
        "wall_s": wall_s,
        "stages": stages,
        "own_s": overhead_s,
        "own_share": overhead_s / (overhead_s + work_s) if overhead_s + work_s else 0.0,
    }


def summaries(results: Path) -> dict[Path, Json]:
    """The summaries of all sweeps that wrote into a folder of records, oldest first; other files are left out."""
    by_path: dict[Path, Json] = {}
    for path in sorted((results / "sweeps").glob("*.json")):
        with suppress(OSError, ValueError):
            loaded = json.loads(path.read_text())
            if isinstance(loaded, dict) and {"runs", "wall_s", "stages", "own_share"} <= loaded.keys():
                by_path[path] = loaded
    return by_path


def write_summary(folder: Path, values: Json) -> Path:
    """Write a summary next to the folder of its sweep; returns its file."""
    target = folder.with_suffix(".json")
    target.write_text(json.dumps(values, indent=1) + "\n")
    return target
