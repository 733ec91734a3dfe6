"""Two processes give the same bits; on a GPU, the settings for this are made, and restored afterwards."""

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

# All ways to choose codes: rounding, error feedback, searches, k-means, training, random rotations.
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
    """The results of a run without cached statistics: nll, layers, and a hash of everything that it stores."""
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
        record, _ = execute_run(resolve(*TINY, *options, *overrides))
    assert record.status == "ok", record.error
    return {
        "run_id": record.run_id,
        "window_nll": record.window_nll,
        "layers": record.layers,
        "threads": record.environment.threads,
        "stored": stored.hexdigest(),
    }


def all_results(folder: str) -> str:
    """The results of all methods, as JSON."""
    return json.dumps({name: results(folder, overrides) for name, overrides in METHODS.items()})


def in_new_process(folder: Path) -> str:
    """The results of all methods, from a new process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-m", "tests.runs.test_determinism", str(folder)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    first = json.loads(in_new_process(tmp_path / "first"))
    second = json.loads(all_results(f"{tmp_path}/second"))
    assert list(first) == list(METHODS)
    differing = [
        f"{method}.{key}" for method in METHODS for key in first[method] if first[method][key] != second[method][key]
    ]
    assert differing == []
    assert all(len(result["layers"]) == 14 and len(result["window_nll"]) == 2 for result in first.values())
    assert len({result["stored"] for result in first.values()}) == len(METHODS), "the hash must distinguish the methods"


def test_settings_for_a_gpu_are_made_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own setting stays"
    with repeatable(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_settings_are_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    def fail() -> None:
        with repeatable(torch.device("cuda")):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()


if __name__ == "__main__":
    sys.stdout.write(all_results(sys.argv[1]))
