"""Which records are results of other code than today's."""

from __future__ import annotations

from collections.abc import Iterable

from harness.config import build_run
from harness.records import Record
from harness.runs import identity


def stale_ids(records: Iterable[Record]) -> set[str]:
    """Run ids of finished records whose code is not what their configuration reaches today.

    A configuration that can no longer be built counts too.
    """
    return {record.run_id for record in records if record.status == "ok" and record.code != _code_today(record)}


def _code_today(record: Record) -> str | None:
    device = (record.execution.device or "cpu").partition(":")[0]
    try:
        return identity.code(build_run(record.config), device)
    except (ValueError, KeyError, TypeError):
        return None
