"""The memory of a process: what its allocator keeps of freed tensors, and gives back when a peak is measured."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
import psutil, torch
from harness.evaluation.memory import reset_peak_memory
from harness.utils.allocator import keep_freed_memory

def resident():
    return psutil.Process().memory_info().rss / 2**20

if sys.argv[1] == "keep":
    keep_freed_memory()
tensors = [torch.ones(2**22) for _ in range(20)]  # 16 MiB each
full = resident()
del tensors
freed = full - resident()
reset_peak_memory(torch.device("cpu"))
print(freed, full - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_kept_until_a_peak_is_reset() -> None:
    def run(mode: str) -> list[float]:
        done = subprocess.run([sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True)
        return [float(part) for part in done.stdout.split()]

    freed, freed_at_reset = run("keep")
    assert freed < 20, "MiB; 320 were freed"
    assert freed_at_reset > 300
    assert run("default")[0] > 200, "this allocator returns freed memory by default"
