"""Names of models that tell different weights apart: two folders of one name are two models."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from harness.records import Record
from harness.reports.describe import at, describe

_FEWEST = 4  # characters of a fingerprint


def told_apart(records: Sequence[Record]) -> list[Record]:
    """The records, with longer names of the models that share a name and have different weights.

    A folder gets as many of its parent folders as tell it apart: "a/my_llama" and "b/my_llama". Other weights, such as
    two revisions of a hub, get the first characters of their fingerprint. Random weights follow the seed, which tables
    show, and keep their name.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if at(record.config, "model", "architecture") is None:
            groups[str(describe(record)["model"])].append(record)
    names = {id(record): name for group in groups.values() for record, name in _named(group)}
    return [_renamed(record, names.get(id(record))) for record in records]


def _named(group: Sequence[Record]) -> Iterable[tuple[Record, str]]:
    """The records of one name, each with its new name; runs that failed before their weights were known keep theirs."""
    name = str(describe(group[0])["model"])
    fingerprints = {_path(record): record.model.fingerprint for record in group if record.model.fingerprint}
    keys = [record.model.fingerprint or fingerprints.get(_path(record)) or _path(record) for record in group]
    paths = {key: _path(record) for key, record in zip(reversed(keys), reversed(group), strict=True) if key}
    if len(paths) < 2:
        return []
    suffixes = _suffixes({path for path in paths.values() if path})
    longer = {key: _with_folder(name, suffixes[path]) if path else name for key, path in paths.items()}
    for same in {value: [key for key in longer if longer[key] == value] for value in longer.values()}.values():
        if len(same) > 1:
            longer |= {key: f"{longer[key]} {short}" for key, short in zip(same, _prefixes(same), strict=True)}
    return [(record, longer[key]) for record, key in zip(group, keys, strict=True) if key]


def _with_folder(name: str, suffix: str) -> str:
    return suffix if suffix.rpartition("/")[2] == name else f"{name} ({suffix})"


def _suffixes(paths: set[str]) -> dict[str, str]:
    """The shortest ends of paths that differ from each other."""
    parts = {path: Path(path).parts for path in paths}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        ends = {path: "/".join(names[-count:]) for path, names in parts.items()}
        if len(set(ends.values())) == len(paths):
            return ends
    return {path: path for path in paths}


def _prefixes(fingerprints: Sequence[str]) -> list[str]:
    for count in range(_FEWEST, max(map(len, fingerprints), default=_FEWEST) + 1):
        if len({text[:count] for text in fingerprints}) == len(fingerprints):
            return [text[:count] for text in fingerprints]
    return list(fingerprints)


def _path(record: Record) -> str:
    path = at(record.config, "model", "path")
    return os.path.normpath(str(path)) if path else ""


def _renamed(record: Record, name: str | None) -> Record:
    if name is None or name == str(describe(record)["model"]):
        return record
    return replace(record, model=replace(record.model, name=name))
