"""Energy counters, read from a fake powercap folder and a fake NVML, and the energy metrics measured with them."""

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
from harness.evaluation.workload import Eager, random_tokens
from harness.runs import execute_run
from tests.support.families import build

Tiny = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


def zone(folder: Path, name: str, label: str, used: int, wrap: int = 1000) -> Path:
    """Create a powercap zone with `used` microjoules that wraps at `wrap`; returns its counter file."""
    directory = folder / name
    directory.mkdir()
    for file, content in (("name", label), ("energy_uj", used), ("max_energy_range_uj", wrap)):
        (directory / file).write_text(f"{content}\n")
    return directory / "energy_uj"


def test_packages_are_summed_and_their_subzones_left_out(tmp_path: Path) -> None:
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


def test_a_counter_that_wraps_is_corrected(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 990, wrap=1000)
    meter = energy.meter(CPU, tmp_path)
    assert meter is not None
    before = meter.read()
    counter.write_text("15\n")
    assert meter.joules(before, meter.read()) == pytest.approx(25e-6)


@pytest.mark.parametrize("broken", ["missing", "empty", "no package", "unreadable", "no number", "no range"])
def test_unreadable_counters_give_no_meter(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "powercap"
    if broken != "missing":
        folder.mkdir()
    if broken not in ("missing", "empty"):
        counter = zone(folder, "intel-rapl:0", "psys" if broken == "no package" else "package-0", 5)
        if broken == "unreadable":  # reading a folder fails for root too
            counter.unlink()
            counter.mkdir()
        elif broken == "no number":
            counter.write_text("\n")
        elif broken == "no range":
            (counter.parent / "max_energy_range_uj").unlink()
    assert energy.meter(CPU, folder) is None


class NVMLError(Exception):
    """Replaces pynvml's exception."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake pynvml with one GPU, which has used 2000 mJ, and 1500 mJ more at each reading."""
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


def test_nvml_reads_the_device_of_the_run(nvml: SimpleNamespace) -> None:
    meter = energy.meter(CUDA)
    assert meter is not None
    assert meter.source == "nvml"
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(1.5)


@pytest.mark.parametrize("failing", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"])
def test_devices_that_nvml_does_not_support_give_no_meter(nvml: SimpleNamespace, failing: str) -> None:
    def fail(*_args: Any) -> None:
        raise NVMLError

    setattr(nvml, failing, fail)
    assert energy.meter(CUDA) is None


def test_a_missing_library_gives_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    assert energy.meter(CUDA) is None


def test_joules_count_the_calls_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "_BLOCK_S", 0.0)
    cfg = MeasureConfig(batch_size=3, prompt_len=5, decode_tokens=4, warmup=1, repeats=1)
    shapes: list[tuple[int, ...]] = []
    joules = 0

    def spend(_module: Any, args: Any, options: dict[str, Any]) -> None:
        nonlocal joules
        tokens = options["input_ids"]
        shapes.append(tuple(tokens.shape))
        joules += tokens.numel()

    def model(per_token: int) -> Any:
        llama = build("llama")
        for _ in range(per_token):
            llama.register_forward_pre_hook(spend, with_kwargs=True)
        return llama

    meter = Meter("fake", lambda: [joules], (0,), 1.0)
    tokens = random_tokens(model(0), cfg, 0)
    metrics = energy.energy((Eager(model(2), *tokens), Eager(model(3), *tokens)), meter)
    assert metrics == {
        "prefill_j": 2 * 3 * 5,
        "decode_j_per_token": 2,
        "baseline_prefill_j": 3 * 3 * 5,
        "baseline_decode_j_per_token": 3,
    }
    assert set(shapes) == {(3, 5), (3, 1)}


def test_short_calls_are_repeated_until_counters_have_ticked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "milliseconds", lambda *_: 50.0)
    calls: list[int] = []
    meter = Meter("fake", lambda: [len(calls)], (0,), 2.0)
    assert energy._joules(meter, lambda: lambda: calls.append(0), CPU) == 2.0
    assert len(calls) == 3 * 10  # three blocks of half a second


def test_a_run_records_energy_and_its_source_only_with_a_counter(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = ("method=none", "measure=quick", "measure.prompt_len=8", "measure.decode_tokens=2", "force=true")
    monkeypatch.setattr("harness.evaluation.assess.meter", lambda _device: None)
    without = execute_run(tiny(*timed))[0]
    assert without.status == "ok", without.error
    assert not [name for name in without.metrics if "_j" in name]
    assert without.execution.energy_source is None
    assert without.warnings == []

    readings = iter(range(10**6))
    monkeypatch.setattr(energy, "_BLOCK_S", 0.01)
    fake = Meter("fake", lambda: [next(readings)], (0,), 1.0)
    monkeypatch.setattr("harness.evaluation.assess.meter", lambda _device: fake)
    measured = execute_run(tiny(*timed))[0]
    assert measured.status == "ok", measured.error
    assert measured.execution.energy_source == "fake"
    for name in ("prefill_j", "decode_j_per_token", "baseline_prefill_j", "baseline_decode_j_per_token"):
        assert measured.metrics[name] > 0
