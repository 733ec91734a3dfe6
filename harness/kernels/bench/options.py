"""The options of the kernel benchmark, and the shapes that it knows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

SHAPES = {  # (N out, K in) of the linears, fused as engines do on GPUs; not fused for smollm2 and llama3_1b
    "smollm2": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
    "llama3_1b": {"q, o": (2048, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)},
    "llama3_8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama3_70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
DTYPES = ("bfloat16", "float16", "float32")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "models": ["llama3_8b", "llama3_70b"],
        "rows": [1, 4, 16, 64, 256, 4096],
        "group_size": 128,
        "seconds": 0.05,
    },
    "cpu": {"models": ["smollm2", "llama3_1b"], "rows": [1, 4, 16, 64, 256, 512], "group_size": 64, "seconds": 0.3},
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a run.

    Raises: SystemExit with a message if they are wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m harness.kernels.bench", description=str(__doc__).split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--models", type=_names, help=f"models with the shapes to measure: {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=_numbers, help="numbers of input rows M")
    parser.add_argument("--group-size", type=int, help="group size of int4 weights")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="dtype of the inputs; float32: on a CPU")
    parser.add_argument("--seconds", type=float, help="seconds of timing for each kernel at each M")
    parser.add_argument("--tune", action="store_true", help="autotune on this GPU first and store the results")
    parser.add_argument("--output", default="results/kernels", help="folder for the JSON and Markdown files")
    options = parser.parse_args(arguments)
    if options.dtype == "float32" and options.device != "cpu":
        parser.error(f"--dtype float32 does not run on {options.device}; expected bfloat16 or float16, or --device cpu")
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
