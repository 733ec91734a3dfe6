"""Two folders of records as one table: rows that moved first, then rows that did not, then rows of one folder only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records import Record, read
from harness.records.folder import load_records
from harness.reports.cells import in_common, names, number, text
from harness.reports.describe import SETTING, describe, label
from harness.reports.match import Pair, match, other_changes, pair_of
from harness.reports.names import told_apart
from harness.reports.render import Sheet
from harness.reports.seeds import mean_over_seeds

_DESCRIBED = ("model", "data", "protocol", "windows", *SETTING, "kernel", "device", "processor", "seed")
_COMPARED = (
    "verdict",
    "perplexity_old",
    "perplexity_new",
    "ratio",
    "ratio_low",
    "ratio_high",
    "interval",
    "others",
    "run_id_old",
    "run_id_new",
)
_COLUMNS = [*_DESCRIBED, *_COMPARED]
_SIGNS = "ratio: perplexity, new / old, with its 95% interval over the windows of both; moved: it does not contain 1"


def comparison_sheet(paths: str, seeds: bool = False) -> Sheet:
    """The sheet of OLD,NEW, two folders or two records; `seeds` compares means over seeds.

    Rows match by `seeds.identity`; two records are a pair whatever they are.

    Raises: ValueError if `paths` are not two folders or records, or two records are of different tokens.
    """
    places = [part.strip() for part in paths.split(",")]
    if len(places) != 2 or not all(places):
        raise ValueError(f"compare={paths} does not name two; expected folders or records, as compare=OLD,NEW")
    old, new = (_read(Path(place), seeds) for place in places)
    named = told_apart([*old, *new])
    old, new = named[: len(old)], named[len(old) :]
    if all(Path(place).is_file() for place in places):
        return _sheet([pair_of(old[0], new[0])], [], places)
    pairs, alone = match(old, new, places)
    return _sheet(sorted(pairs, key=_order), alone, places)


def _read(path: Path, seeds: bool) -> list[Record]:
    if not path.exists():
        raise ValueError(f"compare: {path} is neither a folder nor a record; expected compare=OLD,NEW")
    records = load_records(path) if path.is_dir() else [read(path)]
    if not records:
        raise ValueError(f"compare: {path} holds no records; name a folder that does, such as results/reference")
    return mean_over_seeds(records) if seeds else records


def _order(pair: Pair) -> tuple[bool, bool, str]:
    """Perplexities that moved first, then other figures that moved, then all others."""
    return not pair.moved, not other_changes(pair.old, pair.new), label(pair.new)


def _sheet(pairs: Sequence[Pair], alone: Sequence[tuple[Record, str]], places: Sequence[str]) -> Sheet:
    paired = pd.DataFrame([_row(pair) for pair in pairs], columns=_COLUMNS)
    single = pd.DataFrame([_single_row(record, why, places) for record, why in alone], columns=_COLUMNS)
    frames = [frame for frame in (paired, single) if len(frame)]
    shown = names(paired)
    shown["perplexity"] = [_perplexities(row) for _, row in paired.iterrows()]
    shown["ratio"] = [_ratio(row) for _, row in paired.iterrows()]
    shown["verdict"] = paired["verdict"]
    if paired["others"].any():
        shown["also moved"] = paired["others"]
    notes = sorted(f"{why}: {_long_label(record)}" for record, why in alone)
    return Sheet(pd.concat(frames, ignore_index=True), shown, [_head(paired, places)], notes, ["perplexity", "ratio"])


def _long_label(record: Record) -> str:
    mode = describe(record)["execution"]
    return " ".join(filter(None, (label(record), None if mode == "simulated" else mode, f"({record.run_id})")))


def _head(paired: pd.DataFrame, places: Sequence[str]) -> str:
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in paired["verdict"].value_counts().items())
    head = f"{' -> '.join(places)}: {len(paired)} in both{f' ({verdicts})' if verdicts else ''}"
    return "; ".join(part for part in (head, in_common(paired), _SIGNS) if part)


def _row(pair: Pair) -> dict[str, Any]:
    old, new = describe(pair.old), describe(pair.new)
    described = {
        name: new[name] if old[name] == new[name] else f"{text(old[name])} -> {text(new[name])}" for name in _DESCRIBED
    }
    ratio, low, high = pair.difference.ratio if pair.difference else (None, None, None)
    return described | {
        "verdict": pair.verdict,
        "perplexity_old": pair.old.metrics.get("perplexity"),
        "perplexity_new": pair.new.metrics.get("perplexity"),
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "interval": pair.difference.how if pair.difference else None,
        "others": ", ".join(other_changes(pair.old, pair.new)),
        "run_id_old": pair.old.run_id,
        "run_id_new": pair.new.run_id,
    }


def _single_row(record: Record, why: str, places: Sequence[str]) -> dict[str, Any]:
    row = describe(record)
    side = "old" if why.endswith(f"in {places[0]}") else "new"
    described = {name: row[name] for name in _DESCRIBED} | {"verdict": why, f"run_id_{side}": record.run_id}
    return described | {f"perplexity_{side}": record.metrics.get("perplexity")}


def _perplexities(row: pd.Series[Any]) -> str:
    old, new = (
        "-" if pd.isna(row[name]) else number(row[name], ".2f") for name in ("perplexity_old", "perplexity_new")
    )
    return old if old == new == "-" else f"{old} -> {new}"


def _ratio(row: pd.Series[Any]) -> str:
    if pd.isna(row["ratio"]):
        return "-"
    if pd.isna(row["ratio_low"]) or row["ratio_low"] == row["ratio_high"]:
        return f"{row['ratio']:.4f}x"
    return f"{row['ratio']:.4f}x [{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
