"""Joules of a block of calls, from the counters that the machine has: RAPL of the processor, NVML of a GPU.

A counter that is missing, or may not be read, is no error: there is then no meter, and no figure. Counters tick every
1 to 100 ms and count all that their package or GPU does, idle power included: measure blocks of some tenths of a
second, on a machine that does nothing else.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config import MeasureConfig
from harness.evaluation.workload import Pair, decode_call, milliseconds, prefill_call, random_tokens, synchronize
from harness.nn import MakeCache

POWERCAP = Path("/sys/class/powercap")
_BLOCK_S = 0.5
_BLOCKS = 3
_MOST_CALLS = 256


@dataclass(frozen=True)
class Meter:
    """Counters read together. `wraps` has the value after which each starts again at 0; `unit` is in joules."""

    source: str
    read: Callable[[], Sequence[int]]
    wraps: tuple[int, ...]
    unit: float

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """What was spent between two readings, which are to be less than a whole round of a counter apart."""
        spent = (b - a if b >= a else b - a + wrap for a, b, wrap in zip(before, after, self.wraps, strict=True))
        return self.unit * sum(spent)


def meter(device: torch.device, powercap: Path = POWERCAP) -> Meter | None:
    """The meter of what a run on `device` spends, None where there is none: of the GPU alone, or of all processors."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


@torch.inference_mode()
def energy(
    models: Pair, cfg: MeasureConfig, seed: int, meter: Meter, cache: MakeCache | None = None
) -> dict[str, float]:
    """Joules of a prefill and of a decoded token (of one sequence), of the model and of the baseline.

    Counters are too slow for single calls: a block of calls lasts `_BLOCK_S` or longer, and each figure is the
    median of `_BLOCKS`. Decoded blocks are of caches that were filled before.
    """
    prompt, decoded = random_tokens(models[0], cfg, seed)
    metrics: dict[str, float] = {}
    for name, model, made in zip(("", "baseline_"), models, (cache, None), strict=True):
        fill = prefill_call(model, prompt, made)

        def decoding(model: nn.Module = model, fill: Callable[[], Any] = fill) -> Callable[[], Any]:
            step = decode_call(model, fill(), decoded)
            return lambda: [step() for _ in range(decoded.shape[1])]

        metrics[f"{name}prefill_j"] = _joules(meter, lambda fill=fill: fill, prompt.device)  # type: ignore[misc]
        metrics[f"{name}decode_j_per_token"] = _joules(meter, decoding, prompt.device) / decoded.numel()
    return metrics


def _joules(meter: Meter, prepare: Callable[[], Callable[[], Any]], device: torch.device) -> float:
    """Median joules of one call of what `prepare` gives, each prepared before its block begins."""
    seconds = 1e-3 * milliseconds(prepare(), device)
    calls = min(_MOST_CALLS, max(1, math.ceil(_BLOCK_S / seconds)))
    spent = []
    for _ in range(_BLOCKS):
        block = [prepare() for _ in range(calls)]
        synchronize(device)
        before = meter.read()
        for call in block:
            call()
        synchronize(device)
        spent.append(meter.joules(before, meter.read()) / calls)
    return statistics.median(spent)


def _rapl(powercap: Path) -> Meter | None:
    """Microjoules of each processor package, as Linux shows them below /sys/class/powercap."""
    try:
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _text(zone / "name").startswith("package")]
        wraps = tuple(int(_text(zone / "max_energy_range_uj")) for zone in zones)
        found = Meter("rapl", lambda: [int(_text(zone / "energy_uj")) for zone in zones], wraps, 1e-6)
        return found if zones and found.read() else None
    except (OSError, ValueError):  # since 2020, only root may read energy_uj
        return None


def _text(file: Path) -> str:
    return file.read_text().strip()


def _nvml(device: torch.device) -> Meter | None:
    """Millijoules of one GPU since its driver was loaded; GPUs before Volta do not count them."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        found = Meter("nvml", lambda: [nvml.nvmlDeviceGetTotalEnergyConsumption(handle)], (0,), 1e-3)
        found.read()
    except nvml.NVMLError:
        return None
    return found
