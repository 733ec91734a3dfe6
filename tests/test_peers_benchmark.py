"""The race of whole models: turns alternate, speedups are of one round, a missing library has its reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.peers import llama, race, run
from benchmarks.peers.table import markdown

PROMPT, DECODED = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)


@dataclass
class Fake:
    """A workload that counts time by hand: each call takes `ms`, ten times as long in later rounds."""

    name: str
    ms: float
    calls: list[str]
    prompt: Tensor = PROMPT
    decoded: Tensor = DECODED

    def prefill(self) -> str:
        self.calls.append(f"{self.name} prefill")
        return self.name

    def decode(self, cache: object) -> Callable[[], None]:
        assert cache == self.name
        return lambda: self.calls.append(f"{self.name} step")


def test_all_models_take_turns_and_a_speedup_is_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fakes = {name: Fake(name, ms, calls) for name, ms in (("slow", 4.0), ("fast", 1.0))}

    def milliseconds(call: Callable[[], object], device: torch.device) -> float:
        start = len(calls)
        call()
        slowdown = 10.0 if len(calls) > 20 else 1.0
        return slowdown * sum(fakes[name.split()[0]].ms for name in calls[start:])

    monkeypatch.setattr(race, "milliseconds", milliseconds)
    figures = race.race(fakes, "slow", rounds=4)
    turn = ["{} prefill", "{} step", "{} step"]
    assert calls == [call.format(name) for _ in range(5) for name in ("slow", "fast") for call in turn]
    assert figures["fast"].prefill_speedup == pytest.approx(4.0)
    assert figures["fast"].decode_speedup == pytest.approx(4.0)
    assert figures["slow"].decode_speedup == 1.0
    assert figures["fast"].prefill > figures["fast"].decode  # 4 tokens in one call, 2 in two


def test_a_missing_library_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama.library.cache_clear()
    racing = run.Field(PROMPT, DECODED)
    run._add_llama(racing, tmp_path / "model.gguf", tmp_path, ("F32",))
    assert racing.workloads == {}
    assert "pip install ptqbench[peers]" in racing.absent["llama.cpp"]


def test_the_table_has_models_and_reasons() -> None:
    row = {"model": "int4", "mib": 90.2, "logits_error": 0.1, "prefill": 700.0, "decode": 50.0}
    row |= {"prefill_speedup": 0.9, "decode_speedup": 2.5}
    results = {
        "command": "python",
        "name": "smollm2_raw",
        "baseline": "float32, eager",
        "prompt": 128,
        "steps": 32,
        "threads": 2,
        "rounds": 7,
    }
    results["rows"] = [row]
    text = markdown(results | {"absent": {"llama.cpp": "not installed"}})
    assert "| int4 | 90 | 1.0e-01 | 700 (0.90x) | 50 (2.50x) |" in text
    assert "- llama.cpp: not installed" in text
