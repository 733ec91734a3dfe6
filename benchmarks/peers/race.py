"""Rounds in which every model prefills and decodes once, and what they show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from harness.evaluation.workload import Workload, milliseconds

_CPU = torch.device("cpu")
_WARMUP = 1


@dataclass(frozen=True)
class Figures:
    """Tokens per second of one model, and how many times as fast as the baseline: medians over rounds."""

    prefill: float
    decode: float
    prefill_speedup: float
    decode_speedup: float


@torch.inference_mode()
def race(workloads: Mapping[str, Workload], baseline: str, rounds: int) -> dict[str, Figures]:
    """Let all models take turns; each turn is one prefill and one decode of all tokens."""
    tokens = {name: (work.prompt.numel(), work.decoded.numel()) for name, work in workloads.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workloads}
    for _ in range(_WARMUP + rounds):
        for name, work in workloads.items():
            seconds[name].append(_turn(work))
    return {
        name: _figures(taken[_WARMUP:], seconds[baseline][_WARMUP:], tokens[name]) for name, taken in seconds.items()
    }


def _turn(work: Workload) -> tuple[float, float]:
    """Seconds of a prefill, and of all decode steps after it."""
    caches: list[object] = []
    prefill = milliseconds(lambda: caches.append(work.prefill()), _CPU)
    step = work.decode(caches[0])
    decode = milliseconds(lambda: [step() for _ in range(work.decoded.numel())], _CPU)
    return prefill / 1e3, decode / 1e3


def _figures(taken: list[tuple[float, float]], baseline: list[tuple[float, float]], tokens: tuple[int, int]) -> Figures:
    own, plain = (list(zip(*seconds, strict=True)) for seconds in (taken, baseline))
    rates = [count / statistics.median(seconds) for count, seconds in zip(tokens, own, strict=True)]
    speedups = [statistics.median(b / a for a, b in zip(*pair, strict=True)) for pair in zip(own, plain, strict=True)]
    return Figures(*rates, *speedups)
