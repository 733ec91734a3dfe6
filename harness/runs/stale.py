"""Finds records whose code has changed since."""

from __future__ import annotations

from collections.abc import Iterable

from harness.config import build_run
from harness.records import Record
from harness.runs import identity


def stale_ids(records: Iterable[Record]) -> set[str]:
    """The run ids of finished records whose configuration reaches other code today than when they ran.

    A record whose configuration can no longer be built is stale too.
    """
    return {record.run_id for record in records if record.status == "ok" and record.code != _code_today(record)}


def _code_today(record: Record) -> str | None:
    """The digest of the code that the configuration of a record reaches today; None if it cannot be built."""
    device = (record.execution.device or "cpu").partition(":")[0]
    try:
        return identity.code(build_run(record.config), device)
    except (ValueError, KeyError, TypeError):
        return None
