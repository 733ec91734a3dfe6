"""The results of the stages of an assessment; an absent metric was not measured, and a warning says why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scores:
    """Perplexity with the nll of each window; or the memory of the pass over them, or of one prefill."""

    window_nll: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    kv: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Diverged:
    """Divergence from the float model; empty, with a warning, if the states of both models did not fit on the disk."""

    window_kl: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """Latency and energy of the model and of its baseline; `energy_source` names the counter, if there is one."""

    metrics: dict[str, float] = field(default_factory=dict)
    energy_source: str | None = None
    warnings: list[str] = field(default_factory=list)
