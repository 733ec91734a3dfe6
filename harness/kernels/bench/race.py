"""Race the kernels on real shapes, with torch and triton alone: first right, then fast.

    python -m harness.kernels.bench [--device cuda] [--models llama3_8b,llama3_70b] [--rows 1,4,16,64,256,4096]
                                    [--group-size 128] [--dtype bfloat16] [--tune] [--output results/kernels]

Each kernel is held to float64 of its own decoded weight on fresh random inputs before it is timed. Times are medians
of many calls that each meet a cold weight (on a GPU: CUDA graphs over copies that exceed the L2), beside bf16's of the
same run; the share of the roofline is of the copy bandwidth and the matmul rate measured in the same run. Writes
FOLDER/<device>.json and .md.
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

from harness.core.qtensor import round_to_nearest
from harness.core.scheme import WeightFormat
from harness.kernels.bench import clock
from harness.kernels.bench.contenders import Contender, Entry, contenders
from harness.kernels.bench.report import markdown

SHAPES = {  # N out, K in, of the linears as engines fuse them on GPUs; smollm2's and the 1B model's as they are
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
_CHECKED_OUTPUTS = (
    512  # output features compared with float64: all that a wrong tile, row or group can hide in is in them
)


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: microseconds, `share` of the roofline, `ratio` how many times as fast as bf16."""

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
    """Run what the command line says."""
    options = _options(arguments)
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    if device.type == "cuda" and options.tune:
        _tune(options, device, dtype)
    roofline = clock.roofline(device)
    raced, rows, absent = contenders(device, options.group_size, dtype), list[Row](), dict[str, str]()
    for model in options.models:
        for layer, (N, K) in SHAPES[model].items():
            print(f"{model} {layer}: {N} x {K}", file=sys.stderr)
            rows += _race(raced, _Place(model, layer, N, K), options, roofline, absent)
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
    """What the figures are of."""
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
    """Where a race is run."""

    model: str
    layer: str
    N: int
    K: int


def _race(
    raced: Sequence[Contender],
    place: _Place,
    options: argparse.Namespace,
    roofline: clock.Roofline,
    absent: dict[str, str],
) -> list[Row]:
    """All contenders at one shape and all numbers of rows; one that fails goes to `absent` with its reason."""
    device = torch.device(options.device)
    weight = torch.randn(place.N, place.K, generator=torch.Generator(device).manual_seed(0), device=device) * 0.02
    base, found = dict[int, float](), list[Row]()
    for contender in raced:
        try:
            build = contender.prepare(weight)
            first = build()
            entries = [replace(first, decoded=cache(first.decoded))]  # once, for all numbers of rows
            entries += [build() for _ in range(clock.copies(entries[0].nbytes, device) - 1)]
            for M in options.rows:
                row = _row(contender, entries, place, M, options, roofline)
                base.setdefault(M, row.us_p50)
                found.append(replace(row, ratio=base[M] / row.us_p50))
        except Exception as reason:  # a peer may fail in any way; every way is worth a line, and the race goes on
            absent.setdefault(contender.name, f"{place.N} x {place.K}: {' '.join(str(reason).split())[:300]}")
    return found


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
    found = asdict(place) | asdict(times) | {"floor_us": floor, "share": floor / times.us_p50, "error": error}
    return Row(kernel=contender.name, M=M, ratio=1.0, **found)


def check(entry: Entry, x: Tensor, bound: float) -> float:
    """Relative error of a kernel at some output features, against float64.

    Raises: ValueError if it is above `bound`, or anything but a number.
    """
    found = entry.call(x)
    decoded = entry.decoded()
    picked = torch.randperm(len(decoded), device=x.device)[:_CHECKED_OUTPUTS]
    inputs = x if entry.rounds is None else entry.rounds(x.float())
    expected = inputs.double() @ decoded[picked].t()
    error = float((found[:, picked].double() - expected).norm() / expected.norm())
    if not error <= bound:
        raise ValueError(f"relative error {error:.2g} at M={len(x)}; expected at most {bound:g}")
    return error


def _tune(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Fill the cache of configurations for all that is going to be raced."""
    from harness.kernels.w4a16 import TritonInt, autotune

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
    parser.add_argument("--models", type=_names, help=f"whose shapes: {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=_numbers, help="numbers of input rows, M")
    parser.add_argument("--group-size", type=int, help="of int4 weights")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="of inputs")
    parser.add_argument("--seconds", type=float, help="of timing for each figure")
    parser.add_argument("--tune", action="store_true", help="autotune on this GPU first, and keep what is found")
    parser.add_argument("--output", default="results/kernels", help="folder of the JSON and Markdown files")
    options = parser.parse_args(arguments)
    for key, value in _DEFAULTS["cpu" if options.device == "cpu" else "cuda"].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"{name} is unknown; expected some of {', '.join(SHAPES)}")
    return names


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a number below 1; expected rows of an input")
    return found


def _processor() -> str:
    """The CPU's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
