"""Two fresh processes give the same bits; on a GPU, the settings that this needs, and no trace of them afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.nn import linear
from harness.runs import execute_run
from harness.utils.determinism import repeatable
from tests.conftest import ROOT, TINY, resolve

# Each way of choosing codes: by rounding, by errors fed back, by searches, by k-means and training, at random.
METHODS = {
    "rtn": ("method=rtn",),
    "gptq": ("method=gptq", "bits=3"),
    "awq": ("method=awq", "bits=3"),
    "smoothquant": ("method=smoothquant", "scheme=w8a8_static"),
    "hqq": ("method=hqq",),
    "quip_sharp": ("method=quip_sharp",),
    "aqlm": ("method=aqlm", "method.aqlm.code_bits=4", "method.aqlm.iterations=2"),
    "rotate_gptq": ("method=rotate_gptq", "scheme=w4a4_token"),
}


def results(folder: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """A run that finds no statistics of another: what it scored, its layers, and a hash of all that is stored."""
    stored = hashlib.sha256()
    install = linear.QuantLinear.__init__

    def hashed(self: linear.QuantLinear, *args: Any, **kwargs: Any) -> None:
        install(self, *args, **kwargs)
        for name, tensor in self.state_dict().items():
            stored.update(name.encode())
            stored.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(linear.QuantLinear, "__init__", hashed)
        options = ("measure=off", "engine.cache_gib=0", f"results_dir={folder}")
        found, _ = execute_run(resolve(*TINY, *options, *overrides))
    assert found.status == "ok", found.error
    threads = found.environment.threads
    shown = {"run_id": found.run_id, "window_nll": found.window_nll, "layers": found.layers, "threads": threads}
    return shown | {"stored": stored.hexdigest()}


def fresh(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of all methods, from a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-m", "tests.test_determinism", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return loaded


def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    first, second = (fresh(tmp_path / name) for name in ("first", "second"))
    assert list(first) == list(METHODS)
    differing = [
        f"{method}.{key}" for method in METHODS for key in first[method] if first[method][key] != second[method][key]
    ]
    assert differing == []
    assert all(len(found["layers"]) == 14 and len(found["window_nll"]) == 2 for found in first.values())
    assert len({found["stored"] for found in first.values()}) == len(METHODS), "what is compared has to tell them apart"


def test_a_gpu_is_held_to_repeatable_operators_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with repeatable(torch.device("cuda")):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "a person's own choice stays"
    with repeatable(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_failure_lets_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    def fail() -> None:
        with repeatable(torch.device("cuda")):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()


if __name__ == "__main__":
    json.dump({name: results(sys.argv[1], overrides) for name, overrides in METHODS.items()}, sys.stdout)
