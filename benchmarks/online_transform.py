"""Cost of the online Hadamard transforms: the time of a QuIP# linear, and of its two transforms alone.

    python -m benchmarks.online_transform [repeats]

Shapes are those of linears in the embedded model and in a 1B model, with 1 and 128 tokens. Times are medians of calls
that alternate within one run. The output, results/benchmarks/online_transform.json, contains the milliseconds of the
float32 linear, of the packed linear and of its transforms alone, and the transforms' share of the packed linear's time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.formats import IncoherentQTensor
from harness.core.hadamard import random_signs, rotate, unrotate
from harness.records import environment

OUTPUT = Path(__file__).parent.parent / "results/benchmarks/online_transform.json"
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048))
TOKENS = (1, 128)


@torch.inference_mode()
def measure(shape: tuple[int, int], tokens: int, repeats: int) -> dict[str, float]:
    """Measure the median milliseconds of each part, for a weight of `shape` (N, K) and inputs (tokens, K)."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    left, right = random_signs(rows, generator), random_signs(columns, generator)
    codes = torch.randint(0, 1 << 16, (rows, columns // 8), generator=generator, dtype=torch.int32)
    packed = IncoherentQTensor([codes], 2, torch.tensor([0.02]), left, right)
    weight, inputs = packed.dequantize(), torch.randn(tokens, columns, generator=generator)
    product = F.linear(inputs, weight)

    def transforms() -> Tensor:
        rotate(inputs * right)
        return unrotate(product) * left

    calls: dict[str, Callable[[], Tensor]] = {
        "float": lambda: F.linear(inputs, weight),
        "packed": lambda: packed.linear(inputs, None),
        "transforms": transforms,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {f"{name}_ms": statistics.median(samples[2:]) * 1e3 for name, samples in seconds.items()}


def main(repeats: int = 30) -> None:
    """Measure all shapes, print the results and write OUTPUT."""
    layers = []
    for shape in SHAPES:
        for tokens in TOKENS:
            times = measure(shape, tokens, repeats)
            share = times["transforms_ms"] / times["packed_ms"]
            layers.append({"shape": list(shape), "tokens": tokens} | times | {"transforms_share": share})
            print(json.dumps(layers[-1]))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({"layers": layers, "environment": asdict(environment())}, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
