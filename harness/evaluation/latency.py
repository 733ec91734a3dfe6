"""Latency of a model, timed in pairs with the float model so that slow phases of the machine affect both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.config import MeasureConfig
from harness.evaluation.missing import optional
from harness.evaluation.workload import Eager, Pair, milliseconds, random_tokens
from harness.nn import MakeCache, kvcache
from harness.utils.progress import Track, silent

_MIB = 2**20


@dataclass(frozen=True)
class Latency:
    """Metrics of latency, and a warning for each that the model does not have."""

    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@torch.inference_mode()
def latency(pair: Pair, cfg: MeasureConfig, track: Track = silent) -> Latency:
    """Time prefill and decode of a model; each repetition is paired with one of the baseline.

    A prefill reads the prompt into an empty KV cache and computes the last logits. Decode then adds one token per step
    to that cache. The calls of a pair run back to back in alternating order; a speedup is the median of the pairs'
    ratios. A model that returns no cache has no decode metrics, but a warning.

    Returns: p50, p10 and p90 of the model and p50 of the baseline in milliseconds, the speedups, and the size of the
    model's cache at the end in MiB.
    """
    device = pair[0].prompt.device
    result = Latency()
    caches: list[Any] = []
    with optional(result.warnings, "measure", "latency"):
        prefills = [workload.prefill for workload in pair]
        result.metrics.update(_summary("prefill", _interleave(prefills, cfg.warmup, cfg.repeats, device, track)))
        caches += [prefill() for prefill in prefills]
    if caches:
        with optional(result.warnings, "measure", "decode latency"):
            steps = [workload.decode(filled) for workload, filled in zip(pair, caches, strict=True)]
            result.metrics.update(_summary("decode", _interleave(steps, cfg.warmup, cfg.decode_tokens, device, track)))
            size = kvcache.held_bytes(caches[0])
            result.metrics.update({} if size is None else {"kv_mib": size / _MIB})
    return result


@torch.inference_mode()
def prefill(model: nn.Module, cfg: MeasureConfig, seed: int, cache: MakeCache | None = None) -> None:
    """Run one prefill, the same as `latency` times, without timing it."""
    Eager(model, *random_tokens(model, cfg, seed), cache).prefill()


def _interleave(
    pair: list[Callable[[], Any]], warmup: int, repeats: int, device: torch.device, track: Track
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Milliseconds (repeats, 2) of the two calls of a pair, run in alternating order after `warmup` untimed pairs."""
    times = np.empty((warmup + repeats, 2))
    for i in track(range(warmup + repeats), "latency", warmup + repeats):
        for column in (0, 1) if i % 2 else (1, 0):
            times[i, column] = milliseconds(pair[column], device)
    return times[warmup:]


def _summary(name: str, times: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    percentiles = {f"{name}_ms_p{p}": float(np.percentile(times[:, 0], p)) for p in (50, 10, 90)}
    return percentiles | {
        f"baseline_{name}_ms_p50": float(np.median(times[:, 1])),
        f"{name}_speedup": float(np.median(times[:, 1] / times[:, 0])),
    }
