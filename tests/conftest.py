"""Fixtures and functions that many tests use: configurations of the tiny model, and the command line."""

from __future__ import annotations

import os

# Triton reads this variable when a kernel is decorated, so it must be set before any kernel is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Each worker of pytest-xdist has one core: with more threads, the workers spend most of their time waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import settings
from omegaconf import OmegaConf

from harness import models
from harness.cli import main
from harness.config import build_run
from harness.core import operators
from harness.kernels.native import library
from harness.runs.identity import run_id
from tests.support import interpreter

ROOT = Path(__file__).parent.parent
TINY = ("model=tiny", "data.seq_len=64", "data.max_windows=2", "data.num_samples=4", "data.calibration_seq_len=32")

interpreter.mend()

# One seed and no deadline: the same examples on every machine, fast or slow.
settings.register_profile("ptqbench", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ptqbench")


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Take the objects of libraries and caches out of later collections.

    Each run collects garbage several times, and scanning them took longer than all else in a run of the tiny model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _quiet_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # restored after the test if the command line changed it


def resolve(*overrides: str) -> dict[str, Any]:
    """The resolved configuration for command line `overrides`, as plain values."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)  # type: ignore[return-value]


def run_id_of(raw: dict[str, Any]) -> str:
    """The run id of a resolved configuration."""
    cfg = build_run(raw)
    return run_id(cfg, models.open(cfg.model, cfg.seed))


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the native library. Packed linears in float32 keep their QTensor, whose codes a test may compare."""
    monkeypatch.setattr(library, "available", lambda: False)
    monkeypatch.setattr(operators, "namespace", lambda: None)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Builds configurations of fast runs on random weights, with the temporary folder of the test for results."""
    return lambda *overrides: resolve(*TINY, "measure=off", f"results_dir={tmp_path}", *overrides)


@dataclass
class Done:
    """The exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command line in this process: the same code as in a new process, but faster."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["ptqbench", *arguments])
        capsys.readouterr()
        code = main()
        return Done(code, *capsys.readouterr())

    return run


def harness(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m harness` in a new process, as a user does, but without network."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-m", "harness", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
