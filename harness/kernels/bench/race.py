"""Benchmark the kernels on real shapes: check each result, then time it. Only torch and triton are needed.

    python -m harness.kernels.bench [--device cuda] [--models llama3_8b,llama3_70b] [--rows 1,4,16,64,256,4096]
                                    [--group-size 128] [--dtype bfloat16] [--tune] [--output results/kernels]

Before it is timed, each kernel is compared with float64 arithmetic on its decoded weight and new random inputs. Times
are medians of many calls, each with a cold weight (on a GPU: CUDA graphs over copies that together exceed the L2), and
are compared with bf16 in the same run. The share of the roofline refers to the copy bandwidth and the matmul rate
measured in the same run. Writes FOLDER/<device>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.core import WeightFormat, round_to_nearest
from harness.kernels.bench import clock
from harness.kernels.bench.contenders import Contender, Entry, contenders
from harness.kernels.bench.report import markdown

SHAPES = {  # (N out, K in) of the linears, fused as engines do on GPUs; not fused for smollm2 and llama3_1b
    "smollm2": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
    "llama3_1b": {"q, o": (2048, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)},
    "llama3_8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama3_70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "models": ["llama3_8b", "llama3_70b"],
        "rows": [1, 4, 16, 64, 256, 4096],
        "group_size": 128,
        "seconds": 0.05,
    },
    "cpu": {"models": ["smollm2", "llama3_1b"], "rows": [1, 4, 16, 64, 256], "group_size": 64, "seconds": 0.3},
}
_CHECKED_OUTPUTS = 512  # output features compared with float64: enough to show a wrong tile, row or group


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: times in microseconds, `share` of the roofline, `ratio` = speedup over bf16."""

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
    options = _options(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    if device.type == "cuda" and options.tune:
        _tune(options, device, dtype)
    roofline = clock.roofline(device)
    entrants, rows, absent = contenders(device, options.group_size, dtype), list[Row](), dict[str, str]()
    for model in options.models:
        for layer, (N, K) in SHAPES[model].items():
            print(f"{model} {layer}: {N} x {K}", file=sys.stderr)
            rows += _race(entrants, _Place(model, layer, N, K), options, roofline, absent)
    record = {
        "command": "python -m harness.kernels.bench " + " ".join(arguments),
        "environment": environment(device),
        "roofline": asdict(roofline),
        "group_size": options.group_size,
        "dtype": options.dtype,
        "absent": absent,
        "rows": [asdict(row) for row in rows],
    }
    folder, name = Path(options.output), _slug(record["environment"]["device"])
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


def _race(
    entrants: Sequence[Contender],
    place: _Place,
    options: argparse.Namespace,
    roofline: clock.Roofline,
    absent: dict[str, str],
) -> list[Row]:
    """Measure all contenders at one shape and all numbers of rows. `absent` gets those that fail, with the reason."""
    device = torch.device(options.device)
    weight = torch.randn(place.N, place.K, generator=torch.Generator(device).manual_seed(0), device=device) * 0.02
    baseline_us, rows = dict[int, float](), list[Row]()
    for contender in entrants:
        try:
            build = contender.prepare(weight)
            first = build()
            entries = [replace(first, decoded=cache(first.decoded))]  # decode once for all M
            entries += [build() for _ in range(clock.copies(entries[0].nbytes, device) - 1)]
            for M in options.rows:
                row = _row(contender, entries, place, M, options, roofline)
                baseline_us.setdefault(M, row.us_p50)
                rows.append(replace(row, ratio=baseline_us[M] / row.us_p50))
        except Exception as reason:  # a peer may raise anything: list the reason and go on
            absent.setdefault(contender.name, f"{place.N} x {place.K}: {' '.join(str(reason).split())[:300]}")
    return rows


def _row(
    contender: Contender,
    entries: Sequence[Entry],
    place: _Place,
    M: int,
    options: argparse.Namespace,
    roofline: clock.Roofline,
) -> Row:
    device = torch.device(options.device)
    x = torch.randn(M, place.K, device=device).to(getattr(torch, options.dtype))
    error = check(entries[0], x, contender.bound)
    times = clock.measure([partial(entry.call, x) for entry in entries], device, options.seconds)
    moved = entries[0].nbytes + x.nbytes + x.element_size() * M * place.N
    floor = roofline.floor_us(moved, 2 * M * place.N * place.K)
    fields = asdict(place) | asdict(times) | {"floor_us": floor, "share": floor / times.us_p50, "error": error}
    return Row(kernel=contender.name, M=M, ratio=1.0, **fields)


def check(entry: Entry, x: Tensor, bound: float) -> float:
    """Relative error of a kernel at a random choice of output features, against float64.

    Raises: ValueError if it is NaN or above `bound`.
    """
    outputs = entry.call(x)
    decoded = entry.decoded()
    picked = torch.randperm(len(decoded), device=x.device)[:_CHECKED_OUTPUTS]
    inputs = x if entry.rounds is None else entry.rounds(x.float())
    expected = inputs.double() @ decoded[picked].t()
    error = float((outputs[:, picked].double() - expected).norm() / expected.norm())
    if not error <= bound:
        raise ValueError(f"relative error {error:.2g} at M={len(x)}; expected at most {bound:g}")
    return error


def _tune(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Autotune all shapes of this benchmark and store the configurations in the cache."""
    from harness.kernels.triton.w4a16 import TritonInt, autotune

    for model in options.models:
        for N, K in SHAPES[model].values():
            for symmetric in (False, True):
                fmt = WeightFormat(bits=4, granularity="group", group_size=options.group_size, symmetric=symmetric)
                kernel = TritonInt(round_to_nearest(torch.randn(N, K, device=device), fmt), dtype)
                for M in options.rows:
                    print(f"tune {N} x {K}, M={M}: {autotune(kernel, M)}", file=sys.stderr)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m harness.kernels.bench", description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--models", type=_names, help=f"models with the shapes to measure: {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=_numbers, help="numbers of input rows M")
    parser.add_argument("--group-size", type=int, help="group size of int4 weights")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="dtype of the inputs")
    parser.add_argument("--seconds", type=float, help="seconds of timing per measurement")
    parser.add_argument("--tune", action="store_true", help="autotune on this GPU first and store the results")
    parser.add_argument("--output", default="results/kernels", help="folder for the JSON and Markdown files")
    options = parser.parse_args(arguments)
    for key, value in _DEFAULTS["cpu" if options.device == "cpu" else "cuda"].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"{name} is unknown; expected one or more of {', '.join(SHAPES)}")
    return names


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text} contains a number below 1; expected numbers of input rows")
    return numbers


def _processor() -> str:
    """The name of the CPU, or of its architecture if the system reports no name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
