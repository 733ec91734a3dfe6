"""Compile every kernel for its GPUs, on a machine that may have none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.kernels.inspect import ARCHES, MODULES, SHARED_LIMIT
from tests.conftest import ROOT


def inspect(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "harness.kernels.inspect", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def problems(row: dict[str, Any]) -> list[str]:
    """The problems of one compiled case."""
    expected = {80: "mma", 90: "wgmma"}[row["arch"]] if row["matmul"] else row["tensor_core"]
    checks = {
        f"tensor core {row['tensor_core'] or 'idle'}": row["tensor_core"] != expected,
        f"spills {row['spilled']} bytes": row["spilled"] > 0,
        f"shared memory {row['shared']}": row["shared"] > SHARED_LIMIT[row["arch"]],
    }
    return [f"{row['case']} sm_{row['arch']}: {problem}" for problem, present in checks.items() if present]


def test_tensor_cores_no_spills_and_shared_memory_that_exists(tmp_path: Path) -> None:
    process = inspect("--format", "json", TRITON_CACHE_DIR=str(tmp_path))
    assert process.returncode == 0, process.stderr
    rows = json.loads(process.stdout)
    assert [problem for row in rows for problem in problems(row)] == []
    matmuls = {(row["case"].split(".")[0], row["arch"], row["matmul"]) for row in rows}
    assert matmuls >= {(module, arch, True) for module in MODULES for arch in ARCHES}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, so triton compiles nothing; unset it\n"),
        (("--arch", "75"), {}, "75 is not supported; expected a comma-separated list of 80, 90"),
    ],
)
def test_refusals(arguments: tuple[str, ...], environment: dict[str, str], message: str) -> None:
    process = inspect(*arguments, **environment)
    assert process.returncode
    assert message in process.stderr
