"""What a sweep did: an entry for each run, left by whichever process ran it, and where the time went."""

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

# Forward passes and the method; all else is the harness's own.
WORK = ("allocate", "quantize", "analyse", "evaluate", "divergence", "measure")
_SUFFIX = ".run.json"


@dataclass(frozen=True)
class Entry:
    """One run of a sweep. `wall_s` is from its start to its record, process and all; `stages` are the record's.

    run_id is None where the configuration could not even be read.
    """

    number: int
    run_id: str | None
    status: str
    wall_s: float
    skipped: bool = False
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def work_s(self) -> float:
        """Seconds of forward passes and of the method."""
        return math.fsum(self.stages.get(name, 0.0) for name in WORK)


def entry_of(number: int, found: Record, skipped: bool, wall_s: float) -> Entry:
    """The entry of a run; one that was finished before took none of its stages now."""
    return Entry(number, found.run_id, found.status, wall_s, skipped, {} if skipped else found.stages)


def note(folder: Path, entry: Entry) -> None:
    """Leave an entry in a sweep's folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{entry.number:05d}{_SUFFIX}") as part:
        part.write_text(json.dumps(asdict(entry)))


def entries(folder: Path) -> list[Entry]:
    """All entries of a sweep, in the order of its runs."""
    return [Entry(**json.loads(path.read_text())) for path in sorted(folder.glob(f"*{_SUFFIX}"))]


def summary(found: Sequence[Entry], wall_s: float) -> Json:
    """Where a sweep's `wall_s` went: seconds of each stage, and the share that is the harness's own.

    Its own is everything but forward passes and the method: loading, text, processes, records, waiting. Of runs side
    by side it is counted in each, so that the share is of what all of them took together.
    """
    stages: dict[str, float] = {}
    for entry in found:
        for name, seconds in entry.stages.items():
            stages[name] = stages.get(name, 0.0) + seconds
    ran, work = (math.fsum(getattr(entry, name) for entry in found) for name in ("wall_s", "work_s"))
    own = ran - work + max(0.0, wall_s - ran)
    stages["other"] = max(0.0, ran - math.fsum(stages.values())) + max(0.0, wall_s - ran)
    counts = {name: sum(entry.status == name for entry in found) for name in ("ok", "failed")}
    return {
        "runs": len(found),
        **counts,
        "skipped": sum(entry.skipped for entry in found),
        "wall_s": wall_s,
        "stages": stages,
        "own_s": own,
        "own_share": own / (own + work) if own + work else 0.0,
    }


def summaries(results: Path) -> dict[Path, Json]:
    """The summaries of all sweeps into a folder of records, oldest first; a file that is none is left out."""
    found: dict[Path, Json] = {}
    for path in sorted((results / "sweeps").glob("*.json")):
        with suppress(OSError, ValueError):
            loaded = json.loads(path.read_text())
            if isinstance(loaded, dict) and {"runs", "wall_s", "stages", "own_share"} <= loaded.keys():
                found[path] = loaded
    return found


def write_summary(folder: Path, what: Json) -> Path:
    """Write a summary beside the sweep's folder."""
    target = folder.with_suffix(".json")
    target.write_text(json.dumps(what, indent=1) + "\n")
    return target
