"""Joules of a block of calls, from the energy counters of the machine: RAPL of processors, NVML of a GPU.

A counter that is missing or cannot be read is no error: then there is no meter and no energy metric. Counters tick
every 1 to 100 ms and count all work of their package or GPU, idle power included. So measure blocks of some tenths of
a second, on a machine that does nothing else.
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

from harness.evaluation.workload import Pair, Workload, milliseconds, synchronize

POWERCAP = Path("/sys/class/powercap")
_BLOCK_S = 0.5
_BLOCKS = 3
_MOST_CALLS = 256


@dataclass(frozen=True)
class Meter:
    """Energy counters that are read together. Each wraps to 0 after its value in `wraps`; a count is `unit` joules."""

    source: str
    read: Callable[[], Sequence[int]]
    wraps: tuple[int, ...]
    unit: float

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Energy used between two readings; at most one wrap of each counter may lie between them."""
        counts = (b - a if b >= a else b - a + wrap for a, b, wrap in zip(before, after, self.wraps, strict=True))
        return self.unit * sum(counts)


def meter(device: torch.device, powercap: Path = POWERCAP) -> Meter | None:
    """The energy meter for runs on `device`: of that GPU alone, or of all processors; None if it has no counter."""
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


@torch.inference_mode()
def energy(pair: Pair, meter: Meter) -> dict[str, float]:
    """Joules of a prefill and of one decoded token (of one sequence), for the model and for the baseline.

    Counters are too slow for single calls: a block of calls lasts `_BLOCK_S` seconds or longer, and each metric is the
    median of `_BLOCKS` blocks. The caches of decode blocks are filled before the block starts. A model that returns no
    cache has no decode metrics.
    """
    metrics: dict[str, float] = {}
    for prefix, workload in zip(("", "baseline_"), pair, strict=True):
        device, tokens = workload.prompt.device, workload.decoded.numel()
        metrics[f"{prefix}prefill_j"] = _joules(meter, lambda: workload.prefill, device)  # noqa: B023
        if workload.prefill() is not None:
            joules = _joules(meter, lambda: _all_steps(workload), device)  # noqa: B023
            metrics[f"{prefix}decode_j_per_token"] = joules / tokens
    return metrics


def _all_steps(workload: Workload) -> Callable[[], Any]:
    """All decode steps after a prefill, which runs now, as one call."""
    step = workload.decode(workload.prefill())
    return lambda: [step() for _ in range(workload.decoded.shape[1])]


def _joules(meter: Meter, prepare: Callable[[], Callable[[], Any]], device: torch.device) -> float:
    """Median joules of one call; `prepare` returns a call, and all calls of a block are prepared before it starts."""
    seconds = 1e-3 * milliseconds(prepare(), device)
    calls = min(_MOST_CALLS, max(1, math.ceil(_BLOCK_S / seconds)))
    joules = []
    for _ in range(_BLOCKS):
        block = [prepare() for _ in range(calls)]
        synchronize(device)
        before = meter.read()
        for call in block:
            call()
        synchronize(device)
        joules.append(meter.joules(before, meter.read()) / calls)
    return statistics.median(joules)


def _rapl(powercap: Path) -> Meter | None:
    """The counters of all processor packages in microjoules, from Linux's /sys/class/powercap."""
    try:
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _text(zone / "name").startswith("package")]
        wraps = tuple(int(_text(zone / "max_energy_range_uj")) for zone in zones)
        rapl = Meter("rapl", lambda: [int(_text(zone / "energy_uj")) for zone in zones], wraps, 1e-6)
        return rapl if zones and rapl.read() else None
    except (OSError, ValueError):  # since 2020, only root can read energy_uj
        return None


def _text(file: Path) -> str:
    return file.read_text().strip()


def _nvml(device: torch.device) -> Meter | None:
    """The counter of one GPU in millijoules since its driver was loaded; GPUs before Volta have none."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml = Meter("nvml", lambda: [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)], (0,), 1e-3)
        nvml.read()
    except pynvml.NVMLError:
        return None
    return nvml
