"""Peak memory of the process, or of a GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_MIB = 2**20


def reset_peak_memory(device: torch.device) -> str | None:
    """Start a new peak; returns a warning if the system can only report the peak since the start of the process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps memory that was freed before; return it to the system
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from here
    except (OSError, AttributeError, TypeError):
        return "peak_memory_mib counts from the start of the process: this system cannot reset it"
    return None


def peak_memory_mib(device: torch.device) -> float:
    """Peak since the reset, in MiB: allocated memory of a GPU, or the resident set of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 1024)
