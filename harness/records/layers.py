"""The rows of a record's linears, in a separate Parquet file: several hundred rows are too many for readable JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from harness.utils.names import kind_of

Row = dict[str, Any]


def write_layers(rows: Sequence[Row], path: Path) -> None:
    """Write one row for each linear; a value that is missing in a row is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "write_statistics": False}
    parquet.write_table(table, path, store_schema=False, **options)


def read_layers(path: Path) -> list[Row]:
    """The rows of a file, without null values.

    Raises: OSError or ValueError if the file cannot be read.
    """
    rows: list[Row] = parquet.read_table(path).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each kind of linear, named with `*` for numbers: how many there are, mean bits and largest errors.

    The keys are those of the single rows; an error is the largest of the kind.
    """
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(kind_of(row["name"]), []).append(row)
    return [{"name": name, "linears": len(members)} | _figures(members) for name, members in kinds.items()]


def _figures(rows: Sequence[Row]) -> Row:
    weights = [row["shape"][0] * row["shape"][1] for row in rows]
    figures: Row = {"bits_per_weight": sum(row["stored_bits"] for row in rows) / sum(weights)}
    for name in ("weight_error", "output_error"):
        errors = [row[name] for row in rows if name in row]
        figures |= {name: max(errors)} if errors else {}
    return figures
