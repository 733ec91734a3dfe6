"""The options of a run that differ from their defaults, named as in records and tables."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.config.schema import RunConfig

_LEFT_OUT = ("engine.cache_gib", "mixed.sensitivity")  # neither distinguishes one result from another


def changed_options(cfg: RunConfig) -> dict[str, Any]:
    """Options of steps, engine, analysis and mixed that differ from the defaults of their class, by `step.option`.

    `bits` of a step with codes of its own is the row's width, no option. The float baseline has none.
    """
    if not cfg.steps:
        return {}
    parts: dict[str, Any] = {**cfg.steps, "engine": cfg.engine}
    parts |= {"analysis": cfg.analysis} if cfg.analyses else {}
    parts |= {"mixed": cfg.mixed} if cfg.mixes else {}
    return {
        f"{label}.{item.name}": getattr(part, item.name)
        for label, part in parts.items()
        for item in dataclasses.fields(part)
        if item.name != "bits"
        and f"{label}.{item.name}" not in _LEFT_OUT
        and getattr(part, item.name) != _default(item)
    }


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
