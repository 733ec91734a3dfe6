"""Benchmark the kernels on real shapes: check each result, then time it. Only torch and triton are needed.

    python -m harness.kernels.bench [--device cuda] [--models llama3_8b,llama3_70b] [--rows 1,4,16,64,256,4096]
                                    [--group-size 128] [--dtype bfloat16] [--tune] [--output results/kernels]

Before it is timed, each kernel is compared with float64 arithmetic on its decoded weight and new random inputs. Times
are medians of many calls, each with a cold weight (on a GPU: CUDA graphs over copies that together exceed the L2), and
are compared with the plain matmul of the same dtype: all kernels take turns, and speedups are medians over the rounds.
The share of the roofline refers to the copy bandwidth and the bf16 matmul rate measured before each shape. Writes
FOLDER/<device>.json and .md, or <device>_float32 for float32 inputs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.core import IntWeight, round_to_nearest
from harness.kernels.bench import clock
from harness.kernels.bench.contenders import FLOATS, Contender, Copies, Entry, baseline, contenders
from harness.kernels.bench.options import SHAPES, parse
from harness.kernels.bench.report import markdown
from harness.kernels.native import library
from harness.kernels.table import choose

_CHECKED_OUTPUTS = 512  # output features compared with float64: enough to show a wrong tile, row or group


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: times in microseconds, `share` of the roofline, `ratio` = speedup over the baseline."""

    kernel: str
    model: str
    layer: str
    N: int
    K: int
    M: int
    us_p50: float
    us_p10: float
    us_p90: float
    floor_us: float
    share: float
    ratio: float
    error: float


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark with command-line arguments; write and print its results."""
    options = parse(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    if device.type == "cuda" and options.tune:
        _tune(options, device, dtype)
    entrants, rows, absent = contenders(device, options.group_size, dtype), list[Row](), dict[str, str]()
    if device.type == "cpu" and (problem := library.problem()):
        absent["native kernels"] = problem  # torch's kernels have their names in the table
    rooflines = list[clock.Roofline]()  # one for each shape: a slow phase of the machine would change all shares
    for model in options.models:
        for layer, (N, K) in SHAPES[model].items():
            print(f"{model} {layer}: {N} x {K}", file=sys.stderr)
            rooflines.append(clock.roofline(device))
            rows += _race(entrants, _Place(model, layer, N, K), options, rooflines[-1], absent)
    record = {
        "command": "python -m harness.kernels.bench " + " ".join(arguments),
        "environment": environment(device),
        "roofline": asdict(clock.best(rooflines)),
        "group_size": options.group_size,
        "dtype": options.dtype,
        "baseline": baseline(dtype),
        "absent": absent,
        "rows": [asdict(row) for row in rows],
    }
    folder, name = Path(options.output), _slug(record["environment"]["device"])
    name += "_float32" if dtype == torch.float32 else ""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(record))
    print(markdown(record))


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the library versions of this run."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "threads": None if gpu else torch.get_num_threads(),
        "cpu_capability": None if gpu else torch.backends.cpu.get_cpu_capability(),
        "native": None if gpu else library.description(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
    }


@dataclass(frozen=True)
class _Place:
    """A linear of a model and its shape."""

    model: str
    layer: str
    N: int
    K: int


@dataclass(frozen=True)
class _Ready:
    """A kernel that passed its checks at one shape: its copies, and its relative error at each number of rows."""

    name: str
    entries: list[Entry]
    errors: dict[int, float]


def _race(
    entrants: Sequence[Contender],
    place: _Place,
    options: argparse.Namespace,
    roofline: clock.Roofline,
    absent: dict[str, str],
) -> list[Row]:
    """Measure all contenders at one shape and all numbers of rows. `absent` gets those that fail, with the reason."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    inputs = {M: torch.randn(M, place.K, device=device).to(dtype) for M in options.rows}
    ready = _ready(entrants, place, inputs, absent)
    return [row for x in inputs.values() for row in _rows(_alternated(ready, x, options, absent), place, x, roofline)]


def _ready(
    entrants: Sequence[Contender], place: _Place, inputs: dict[int, Tensor], absent: dict[str, str]
) -> list[_Ready]:
    device = next(iter(inputs.values())).device
    weight = torch.randn(place.N, place.K, generator=torch.Generator(device).manual_seed(0), device=device) * 0.02
    ready, builders = list[_Ready](), list[Copies]()
    for contender in entrants:
        try:
            build = contender.prepare(weight)
            first = build()
            errors = dict(zip(inputs, check(first, list(inputs.values()), contender.bound), strict=True))
        except Exception as reason:  # a contender that fails, for whatever reason, must not end the others' race
            absent.setdefault(contender.name, f"{place.N} x {place.K}: {' '.join(str(reason).split())[:300]}")
        else:
            ready.append(_Ready(contender.name, [first], errors))
            builders.append(build)
    together = sum(kernel.entries[0].nbytes for kernel in ready)
    for kernel, build in zip(ready, builders, strict=True):
        kernel.entries.extend(build() for _ in range(clock.copies(kernel.entries[0].nbytes, device, together) - 1))
    return ready


def _alternated(
    ready: Sequence[_Ready], x: Tensor, options: argparse.Namespace, absent: dict[str, str]
) -> list[tuple[_Ready, list[clock.Turn]]]:
    """Let all kernels take turns on x (M, K). `absent` gets those that cannot, such as kernels that a graph refuses."""
    able, turns = [], []
    for kernel in ready:
        try:
            turns.append(clock.turns_of([partial(entry.call, x) for entry in kernel.entries], x.device))
        except Exception as reason:
            absent.setdefault(kernel.name, f"M={len(x)}: {' '.join(str(reason).split())[:300]}")
        else:
            able.append(kernel)
    return list(zip(able, clock.alternate(turns, options.seconds), strict=True)) if able else []


def _rows(
    taken: list[tuple[_Ready, list[clock.Turn]]], place: _Place, x: Tensor, roofline: clock.Roofline
) -> list[Row]:
    plain = next((turns for kernel, turns in taken if kernel.name == baseline(x.dtype)), [])
    rows = []
    for kernel, turns in taken:
        moved = kernel.entries[0].nbytes + x.nbytes + x.element_size() * len(x) * place.N
        floor = roofline.floor_us(moved, 2 * len(x) * place.N * place.K)
        times = clock.times(turns)
        fields: dict[str, Any] = asdict(place) | asdict(times) | {"floor_us": floor, "share": floor / times.us_p50}
        ratio, error = clock.speedup(plain, turns), kernel.errors[len(x)]
        rows.append(Row(kernel=kernel.name, M=len(x), ratio=ratio, error=error, **fields))
    return rows


def check(entry: Entry, inputs: Sequence[Tensor], bound: float) -> list[float]:
    """Relative errors of a kernel for each of `inputs` (M, K), at a random choice of output features, against float64.

    Raises: ValueError if one is NaN or above `bound`.
    """
    decoded = entry.decoded()
    picked = torch.randperm(len(decoded), device=decoded.device)[:_CHECKED_OUTPUTS]
    decoded = decoded[picked]
    errors = []
    for x in inputs:
        rounded = x if entry.rounds is None else entry.rounds(x.float())
        expected = rounded.double() @ decoded.t()
        errors.append(float((entry.call(x)[:, picked].double() - expected).norm() / expected.norm()))
        if not errors[-1] <= bound:
            raise ValueError(f"relative error {errors[-1]:.2g} at M={len(x)}; expected at most {bound:g}")
    return errors


def _tune(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Autotune all shapes of this benchmark and store the configurations in the cache."""
    from harness.kernels.triton.weight_only import WeightOnly, autotune

    int4 = partial(IntWeight, bits=4, granularity="group", group_size=options.group_size)
    formats = [int4(symmetric=False), int4(symmetric=True), *FLOATS.values()]
    for model in options.models:
        for N, K in SHAPES[model].values():
            for fmt in formats:
                kernel = choose(round_to_nearest(torch.randn(N, K, device=device), fmt), None, dtype, device)
                if not isinstance(kernel, WeightOnly):
                    continue  # the race says that it is absent
                for M in options.rows:
                    print(f"tune {kernel.name} {N} x {K}, M={M}: {autotune(kernel, M)}", file=sys.stderr)


def _processor() -> str:
    """The name of the CPU, or of its architecture if the system reports no name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
