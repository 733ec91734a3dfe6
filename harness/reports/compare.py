"""Two folders of records as one table: rows that moved first, then what is the same, then what only one of them has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.store import Record, read
from harness.reports.cells import in_common, names, number, text
from harness.reports.frame import SETTING, describe, label, load
from harness.reports.match import Pair, match, others_that_moved, paired_difference
from harness.reports.render import Sheet
from harness.reports.seeds import mean_over_seeds

_DESCRIBED = (
    "model",
    "data",
    "protocol",
    "windows",
    *SETTING,
    "kernel",
    "device",
    "seed",
)
_COLUMNS = [
    *_DESCRIBED,
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
]


def compare(asked: str, seeds: bool = False) -> Sheet:
    """The sheet of OLD,NEW, two folders or two records; `seeds` compares means over seeds.

    Rows match by `seeds.identity`; two records are a pair whatever they are.
    Raises: ValueError for what is no two folders or records, or two records of different tokens.
    """
    places = [part.strip() for part in asked.split(",")]
    if len(places) != 2 or not all(places):
        raise ValueError(f"compare={asked} does not name two; expected folders or records, as compare=OLD,NEW")
    old, new = (_read(Path(place), seeds) for place in places)
    if all(Path(place).is_file() for place in places):
        return _sheet([Pair(old[0], new[0], paired_difference(old[0], new[0]))], [], places)
    pairs, alone = match(old, new, places)
    return _sheet(sorted(pairs, key=_order), alone, places)


def _read(path: Path, seeds: bool) -> list[Record]:
    if not path.exists():
        raise ValueError(f"compare: {path} is neither a folder nor a record; expected compare=OLD,NEW")
    records = load(path) if path.is_dir() else [read(path)]
    if not records:
        raise ValueError(f"compare: {path} holds no records; name a folder that does, such as results/reference")
    return mean_over_seeds(records) if seeds else records


def _order(pair: Pair) -> tuple[bool, bool, str]:
    """Perplexities that moved first, then other figures, then what is as it was."""
    return not pair.moved, not others_that_moved(pair.old, pair.new), label(pair.new)


def _sheet(pairs: Sequence[Pair], alone: Sequence[tuple[Record, str]], places: Sequence[str]) -> Sheet:
    matched = pd.DataFrame([_row(pair) for pair in pairs], columns=_COLUMNS)
    rest = pd.DataFrame([_lone(record, why, places) for record, why in alone], columns=_COLUMNS)
    parts = [part for part in (matched, rest) if len(part)]
    shown = names(matched)
    shown["perplexity"] = [_change(row) for _, row in matched.iterrows()]
    shown["ratio"] = [_ratio(row) for _, row in matched.iterrows()]
    shown["verdict"] = matched["verdict"]
    if matched["others"].any():
        shown["also moved"] = matched["others"]
    notes = sorted(f"{why}: {_long_label(record)}" for record, why in alone)
    return Sheet(
        pd.concat(parts, ignore_index=True),
        shown,
        _head(matched, places),
        notes,
        ["perplexity", "ratio", "verdict", "also moved"],
    )


def _long_label(record: Record) -> str:
    mode = describe(record)["execution"]
    return " ".join(filter(None, (label(record), None if mode == "simulated" else mode, f"({record.run_id})")))


def _head(matched: pd.DataFrame, places: Sequence[str]) -> str:
    counts = matched["verdict"].value_counts()
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    what = "ratio: perplexity, new / old, with its 95% interval over the windows of both; moved: it leaves 1 out"
    head = f"{' -> '.join(places)}: {len(matched)} in both{f' ({found})' if found else ''}"
    return "; ".join(part for part in (head, in_common(matched), what) if part)


def _row(pair: Pair) -> dict[str, Any]:
    was, now = describe(pair.old), describe(pair.new)
    changed = {
        name: now[name] if was[name] == now[name] else f"{text(was[name])} -> {text(now[name])}" for name in _DESCRIBED
    }
    ratio, low, high = pair.apart.ratio if pair.apart else (None, None, None)
    return changed | {
        "verdict": pair.verdict,
        "perplexity_old": pair.old.metrics.get("perplexity"),
        "perplexity_new": pair.new.metrics.get("perplexity"),
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "interval": pair.apart.how if pair.apart else None,
        "others": ", ".join(others_that_moved(pair.old, pair.new)),
        "run_id_old": pair.old.run_id,
        "run_id_new": pair.new.run_id,
    }


def _lone(record: Record, why: str, places: Sequence[str]) -> dict[str, Any]:
    row = describe(record)
    side = "old" if why.endswith(f"in {places[0]}") else "new"
    found = {name: row[name] for name in _DESCRIBED} | {"verdict": why, f"run_id_{side}": record.run_id}
    return found | {f"perplexity_{side}": record.metrics.get("perplexity")}


def _change(row: pd.Series[Any]) -> str:
    was, now = (
        "-" if pd.isna(row[name]) else number(row[name], ".2f") for name in ("perplexity_old", "perplexity_new")
    )
    return was if was == now == "-" else f"{was} -> {now}"


def _ratio(row: pd.Series[Any]) -> str:
    if pd.isna(row["ratio"]):
        return "-"
    if pd.isna(row["ratio_low"]) or row["ratio_low"] == row["ratio_high"]:
        return f"{row['ratio']:.4f}x"
    return f"{row['ratio']:.4f}x [{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
