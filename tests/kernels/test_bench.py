"""The kernel benchmark: a wrong kernel is not timed, an absent one has a reason, and the table shows the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.kernels import scaled_mm
from harness.kernels.bench import clock, race
from harness.kernels.bench.contenders import Contender, Entry, contenders
from harness.kernels.bench.options import parse
from harness.kernels.bench.report import markdown
from harness.kernels.bench.targets import cpu_targets
from harness.kernels.native import library
from harness.kernels.table import choose
from harness.kernels.triton import weight_only
from harness.kernels.triton.weight_only import WeightOnly

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "roofline", lambda device: clock.Roofline(1e10, 1e11))
    monkeypatch.setattr(clock, "copies", lambda nbytes, device, together: 2)
    monkeypatch.setitem(race.SHAPES, "smollm2", {"k, v": (192, 64)})


def test_a_run_writes_a_record_and_its_table(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    race.main(["--models", "smollm2", "--rows", "1,70", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)])
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    kernels = {row["kernel"] for row in record["rows"]}
    assert {"bf16", "fp32", "int4 g64", "int4 g64 sym", "int8"} <= kernels
    for row in record["rows"]:
        assert row["us_p10"] <= row["us_p50"] <= row["us_p90"]
        assert row["error"] < 0.03
        assert row["share"] == pytest.approx(row["floor_us"] / row["us_p50"])
    assert {row["ratio"] for row in record["rows"] if row["kernel"] == "bf16"} == {1.0}
    printed = capsys.readouterr().out
    assert next(tmp_path.glob("*.md")).read_text() == markdown(record)
    assert "### smollm2 k, v: N = 192, K = 64" in printed
    assert "| smollm2 | int4: share of copy bandwidth | 70% |" in printed


def test_a_native_library_that_cannot_be_used_has_its_reason_in_the_table(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "problem", lambda: "built from other sources; run make setup again")
    race.main(["--models", "smollm2", "--rows", "1", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)])
    assert "- native kernels: built from other sources" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_kernel_that_the_table_has_for_this_device_is_right(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 128) * 0.02
    for contender in contenders(CPU, 64, dtype):
        try:
            entry = contender.prepare(weight)()
        except (ImportError, ValueError):  # a peer that is not installed, a processor without VNNI
            continue
        race.check(entry, [torch.randn(M, 128).to(dtype) for M in (1, 70)], contender.bound)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mxfp4", torch.float16),
        ("nvfp4", torch.float16),
        ("fp8", torch.float16),
        ("w8a8 fp8", torch.bfloat16),
        ("w8a8 fp8 tensor", torch.float16),
    ],
)
def test_kernels_of_a_gpu_are_right(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, and with the product of 8-bit floats of torch for CPUs."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(scaled_mm, "capable", lambda device: True)
    monkeypatch.setattr(
        "harness.kernels.bench.contenders.choose", lambda *three_and_cpu: choose(*three_and_cpu[:3], gpu)
    )
    contender = {contender.name: contender for contender in contenders(gpu, 64, dtype)}[name]
    entry = contender.prepare(torch.randn(64, 128) * 0.02)()
    race.check(entry, [torch.randn(M, 128).to(dtype) for M in (1, 20)], contender.bound)
    swapped = Entry(lambda x: entry.call(x).flip(1), entry.decoded, entry.nbytes, entry.rounds)
    with pytest.raises(ValueError, match="relative error 1"):
        race.check(swapped, [torch.randn(3, 128).to(dtype)], contender.bound)


def test_tuning_covers_integers_and_small_floats(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = list[tuple[str, int, int]]()

    def autotune(kernel: WeightOnly, M: int) -> None:
        tuned.append((kernel.name, kernel.layout.group_size, M))

    monkeypatch.setattr(weight_only, "autotune", autotune)
    monkeypatch.setattr(race, "choose", lambda *three_and_cpu: choose(*three_and_cpu[:3], torch.device("cuda")))
    arguments = ["--models", "smollm2", "--rows", "1,20", "--device", "cpu", "--group-size", "32"]
    race._tune(parse(arguments), CPU, torch.bfloat16)
    assert set(tuned) == {
        (name, size, M)
        for name, size in (("triton_w4a16", 32), ("triton_e2m1", 32), ("triton_e2m1", 16), ("triton_e4m3", 64))
        for M in (1, 20)
    }


def test_a_wrong_kernel_is_named_and_not_timed(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def swapped(weight: Tensor) -> Entry:
        return Entry(lambda x: x @ weight.bfloat16().flip(0).t(), weight.double, weight.nbytes)

    def missing(weight: Tensor) -> Entry:
        raise ImportError("no module named fast")

    entrants = [
        Contender("bf16", lambda weight: lambda: Entry(lambda x: x @ weight.bfloat16().t(), weight.double, 1), 8e-3),
        Contender("swapped", lambda weight: lambda: swapped(weight), 8e-3),
        Contender("fast", lambda weight: lambda: missing(weight), 8e-3),
    ]
    monkeypatch.setattr(race, "contenders", lambda *_: entrants)
    race.main(["--models", "smollm2", "--rows", "3", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)])
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [row["kernel"] for row in record["rows"]] == ["bf16"]
    assert "relative error 1.4 at M=3" in record["absent"]["swapped"]
    assert record["absent"]["fast"] == "192 x 64: no module named fast"
    assert "- fast: 192 x 64: no module named fast" in markdown(record)


def test_targets_are_of_the_slowest_shape() -> None:
    row = {"kernel": "int4 g128", "model": "m", "layer": "a", "N": 1, "K": 2, "M": 1, "us_p50": 9.0, "share": 0.5}
    rows = [row | {"ratio": 3.0}, row | {"layer": "b", "N": 8, "ratio": 2.0}]
    environment = {"device": "GPU", "cuda": "13", "threads": None}
    record = {"rows": rows, "environment": environment, "absent": {}, "command": "c", "dtype": "bfloat16"}
    record["baseline"] = "bf16"
    text = markdown(record | {"group_size": 128, "roofline": {"bandwidth": 4e12, "rate": 8e14}})
    assert "| int4 g128 | 1 | 2.6x | 2.00x | 8 x 2 | missed, 50% of the roofline |" in text


def test_targets_of_a_cpu_are_of_the_worst_shape() -> None:
    def row(kernel: str, N: int, ratio: float, M: int = 1, share: float = 0.8) -> dict[str, Any]:
        return {"kernel": kernel, "model": "m", "N": N, "K": 2, "M": M, "ratio": ratio, "share": share}

    rows = [row("int4 g64", 1, 4.0), row("int4 g64", 8, 3.0, share=0.6), row("int4 g64", 8, 2.0, M=16)]
    rows += [row("int3 g64", 1, 5.0), row("int3 g64", 8, 3.0), row("int2 g64", 1, 8.0)]
    rows += [row("onnxruntime", 1, 2.0), row("onnxruntime", 8, 2.5), row("openvino", 8, 4.0, M=16)]
    text = cpu_targets(rows, 64)
    assert "| m | int4: share of copy bandwidth | 70% | 60% | 8 x 2 | missed |" in text
    assert "| m | int3: time / int4's | 0.85 | 1.00 | 8 x 2 | missed |" in text
    assert "| m | int2: time / int4's | 0.65 | 0.50 | 1 x 2 | met |" in text
    assert "| m | onnxruntime | 1.20x | - |" in text
    assert "| m | openvino | - | 0.50x |" in text


def test_contenders_alternate_and_a_speedup_is_of_neighbouring_turns() -> None:
    order: list[str] = []

    def turn(name: str) -> list[float]:
        order.append(name)
        slow = 100.0 if len(order) > 5 else 1.0  # the machine is slow in the last rounds
        return [slow * (3.0 if name == "a" else 1.0)]

    a, b = clock.alternate([lambda: turn("a"), lambda: turn("b")], 0.0)
    assert order == ["a", "b"] * 5
    assert clock.speedup(a, b) == 3.0
    assert clock.times(a).us_p50 < clock.times(b).us_p50  # the medians alone would say that a is faster


def test_copies_exceed_the_cache_before_one_is_used_again() -> None:
    assert clock.copies(1 << 30, CPU, 1 << 31) == 2
    assert clock.copies(16 << 20, CPU, 1 << 30) == 4  # those of one turn; all contenders read 4 GiB between two turns
    assert clock.copies(1 << 20, CPU, 16 << 20) == 10
    assert clock.copies(1 << 20, torch.device("cuda"), 1 << 30) == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda", "--dtype", "float32"], "--dtype float32 does not run on cuda"),
        (["--models", "gpt5"], "gpt5 is unknown; expected one or more of smollm2"),
        (["--rows", "0"], "contains a number below 1"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        race.main(arguments)
    assert message in capsys.readouterr().err
