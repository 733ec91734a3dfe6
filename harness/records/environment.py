"""The environment of a run, for its record: versions, processor, threads and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from harness.kernels.native import library
from harness.records.record import Environment

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "hydra-core",
    "gguf",
    "bitsandbytes",
)


def environment() -> Environment:
    """The environment of this process."""
    gpu = torch.cuda.is_available()
    return Environment(
        python=platform.python_version(),
        packages={name: _version(name) for name in _PACKAGES},
        platform=platform.platform(),
        cpu=_cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        native=library.description(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        commit=_commit(),
        gpu=torch.cuda.get_device_name() if gpu else None,
        cuda=torch.version.cuda if gpu else None,
    )


def _version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this source tree, with -dirty if tracked files differ from it; None outside a checkout."""
    if not (Path(__file__).parents[2] / ".git").exists():  # a wheel, possibly inside a checkout of another project
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None
