"""Energy counters from a folder and a library that stand for the machine's, and what is measured with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.config import MeasureConfig
from harness.evaluation import energy
from harness.evaluation.energy import Meter
from harness.runs import execute_run
from tests.families import build

Tiny = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


def zone(folder: Path, name: str, label: str, used: int, wrap: int = 1000) -> Path:
    """One zone below a powercap folder: microjoules used so far, and where they start again."""
    place = folder / name
    place.mkdir()
    for file, content in (("name", label), ("energy_uj", used), ("max_energy_range_uj", wrap)):
        (place / file).write_text(f"{content}\n")
    return place / "energy_uj"


def test_packages_are_added_and_their_parts_left_out(tmp_path: Path) -> None:
    counters = [zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", used) for i, used in ((0, 100), (1, 7))]
    zone(tmp_path, "intel-rapl:0:0", "core", 50)
    zone(tmp_path, "intel-rapl:2", "psys", 50)
    meter = energy.meter(CPU, tmp_path)
    assert meter is not None
    assert meter.source == "rapl"
    before = meter.read()
    assert list(before) == [100, 7]
    counters[0].write_text("350\n")
    counters[1].write_text("8\n")
    assert meter.joules(before, meter.read()) == pytest.approx(251e-6)


def test_a_counter_that_wrapped_around(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 990, wrap=1000)
    meter = energy.meter(CPU, tmp_path)
    assert meter is not None
    before = meter.read()
    counter.write_text("15\n")
    assert meter.joules(before, meter.read()) == pytest.approx(25e-6)


@pytest.mark.parametrize("broken", ["missing", "empty", "no package", "unreadable", "no number", "no range"])
def test_counters_that_cannot_be_read_are_absent(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "powercap"
    if broken != "missing":
        folder.mkdir()
    if broken not in ("missing", "empty"):
        counter = zone(folder, "intel-rapl:0", "psys" if broken == "no package" else "package-0", 5)
        if broken == "unreadable":  # a folder in its place fails for root too
            counter.unlink()
            counter.mkdir()
        elif broken == "no number":
            counter.write_text("\n")
        elif broken == "no range":
            (counter.parent / "max_energy_range_uj").unlink()
    assert energy.meter(CPU, folder) is None


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library of one GPU that has used 2000 mJ, and 1500 more at every reading."""
    used: Iterator[int] = iter(range(2000, 10**6, 1500))
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(used) if handle == "GPU-ab-cd" else 1 / 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="ab-cd"))
    return fake


def test_nvml_counts_the_device_of_the_run(nvml: SimpleNamespace) -> None:
    meter = energy.meter(CUDA)
    assert meter is not None
    assert meter.source == "nvml"
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(1.5)


@pytest.mark.parametrize("failing", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_devices_that_nvml_does_not_serve_are_absent(nvml: SimpleNamespace, failing: str) -> None:
    def fail(*_args: Any) -> None:
        raise NVMLError

    setattr(nvml, failing, fail)
    assert energy.meter(CUDA) is None


def test_a_missing_library_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
    assert energy.meter(CUDA) is None


def test_joules_are_those_of_the_calls_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_BLOCK_S", 0.0)
    cfg = MeasureConfig(batch_size=3, prompt_len=5, decode_tokens=4, warmup=1, repeats=1)
    seen: list[tuple[int, ...]] = []
    joules = 0

    def spend(_module: Any, args: Any, options: dict[str, Any]) -> None:
        nonlocal joules
        tokens = options["input_ids"]
        seen.append(tuple(tokens.shape))
        joules += tokens.numel()

    def model(per_token: int) -> Any:
        made = build("llama")
        for _ in range(per_token):
            made.register_forward_pre_hook(spend, with_kwargs=True)
        return made

    meter = Meter("fake", lambda: [joules], (0,), 1.0)
    found = energy.energy((model(2), model(3)), cfg, 0, meter)
    assert found == {
        "prefill_j": 2 * 3 * 5,
        "decode_j_per_token": 2,
        "baseline_prefill_j": 3 * 3 * 5,
        "baseline_decode_j_per_token": 3,
    }
    assert set(seen) == {(3, 5), (3, 1)}


def test_short_calls_are_repeated_until_counters_have_ticked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "milliseconds", lambda *_: 50.0)
    calls: list[int] = []
    meter = Meter("fake", lambda: [len(calls)], (0,), 2.0)
    assert energy._joules(meter, lambda: lambda: calls.append(0), CPU) == 2.0
    assert len(calls) == 3 * 10  # three blocks of half a second


def test_a_run_says_what_it_measured_and_nothing_where_it_cannot(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = ("method=none", "measure=quick", "measure.prompt_len=8", "measure.decode_tokens=2", "force=true")
    monkeypatch.setattr("harness.evaluation.assess.meter", lambda _device: None)
    without = execute_run(tiny(*timed))[0]
    assert without.status == "ok", without.error
    assert not [name for name in without.metrics if "_j" in name]
    assert without.execution.energy_source is None
    assert without.warnings == []

    readings = iter(range(10**6))
    monkeypatch.setattr(energy, "_BLOCK_S", 0.01)
    monkeypatch.setattr("harness.evaluation.assess.meter", lambda _device: Meter("fake", lambda: [next(readings)], (0,), 1.0))
    measured = execute_run(tiny(*timed))[0]
    assert measured.status == "ok", measured.error
    assert measured.execution.energy_source == "fake"
    for name in ("prefill_j", "decode_j_per_token", "baseline_prefill_j", "baseline_decode_j_per_token"):
        assert measured.metrics[name] > 0
