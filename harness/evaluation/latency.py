"""Latency and energy beside the float model in one run, and the peak memory of the process."""

from __future__ import annotations

import ctypes
import gc
import inspect
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.config.schema import MeasureConfig
from harness.evaluation.energy import Meter
from harness.nn import kvcache
from harness.nn.kvcache import MakeCache
from harness.utils.progress import Track, silent

Metrics = dict[str, float]
Pair = tuple[nn.Module, nn.Module]  # the model, and the float model that it is compared with
_MIB = 2**20
_BLOCK_S = 0.5
_BLOCKS = 3
_MOST_CALLS = 256


@torch.inference_mode()
def latency(
    models: Pair, cfg: MeasureConfig, seed: int, track: Track = silent, cache: MakeCache | None = None
) -> Metrics:
    """Time prefill and decode of a model, each repetition paired with one of the baseline.

    Prefill reads `prompt_len` tokens for `batch_size` sequences into a fresh KV cache and computes the last
    logits. Decode then adds one token a step to that cache. Pairs run back to back in alternating order, so
    that a slow spell of the machine falls on both; a speedup is the median of the pairs' ratios.

    The model's cache is `cache()`, the baseline's a float one.

    Returns: p50, p10 and p90 in milliseconds, of the baseline too, the speedups, and what the model's cache held in
    the end.
    """
    device = next(models[0].parameters()).device
    prompt, rest = _tokens(models[0], cfg, seed)

    prefills = [_prefill(each, prompt, made) for each, made in zip(models, (cache, None), strict=True)]
    metrics = _summary("prefill", _interleave(prefills, cfg.warmup, cfg.repeats, device, track))
    caches = [prefill() for prefill in prefills]
    steps = [_decoder(each, filled, rest) for each, filled in zip(models, caches, strict=True)]
    metrics |= _summary("decode", _interleave(steps, cfg.warmup, cfg.decode_tokens, device, track))
    held = kvcache.held_bytes(caches[0])
    return metrics if held is None else metrics | {"kv_mib": held / _MIB}


@torch.inference_mode()
def energy(models: Pair, cfg: MeasureConfig, seed: int, meter: Meter, cache: MakeCache | None = None) -> Metrics:
    """Joules of a prefill and of a decoded token (of one sequence), of the model and of the baseline.

    Counters are too slow for single calls: a block of calls lasts `_BLOCK_S` or longer, and each figure is the
    median of `_BLOCKS`. Decoded blocks are of caches that were filled before.
    """
    prompt, rest = _tokens(models[0], cfg, seed)
    metrics: Metrics = {}
    for name, model, made in zip(("", "baseline_"), models, (cache, None), strict=True):
        fill = _prefill(model, prompt, made)

        def decoding(model: nn.Module = model, fill: Callable[[], Any] = fill) -> Callable[[], Any]:
            step = _decoder(model, fill(), rest)
            return lambda: [step() for _ in range(rest.shape[1])]

        metrics[f"{name}prefill_j"] = _joules(meter, lambda fill=fill: fill, prompt.device)  # type: ignore[misc]
        metrics[f"{name}decode_j_per_token"] = _joules(meter, decoding, prompt.device) / rest.numel()
    return metrics


def _joules(meter: Meter, prepare: Callable[[], Callable[[], Any]], device: torch.device) -> float:
    """Median joules of one call of what `prepare` gives, each prepared before its block begins."""
    seconds = 1e-3 * _milliseconds(prepare(), device)
    calls = min(_MOST_CALLS, max(1, math.ceil(_BLOCK_S / seconds)))
    spent = []
    for _ in range(_BLOCKS):
        block = [prepare() for _ in range(calls)]
        _synchronize(device)
        before = meter.read()
        for call in block:
            call()
        _synchronize(device)
        spent.append(meter.joules(before, meter.read()) / calls)
    return statistics.median(spent)


@torch.inference_mode()
def prefill(model: nn.Module, cfg: MeasureConfig, seed: int, cache: MakeCache | None = None) -> None:
    """Run the prefill that is timed once, untimed."""
    _prefill(model, _tokens(model, cfg, seed)[0], cache)()


def reset_peak_memory(device: torch.device) -> str | None:
    """Start a new peak; returns a warning where the system only knows the peak since the process began."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which is not this model's
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from here
    except (OSError, AttributeError, TypeError):
        return "peak_memory_mib counts from the start of the process: this system cannot reset it"
    return None


def peak_memory_mib(device: torch.device) -> float:
    """Peak since the reset: allocated memory of a GPU, or the resident set of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (_MIB if sys.platform == "darwin" else 1024)


def _tokens(model: nn.Module, cfg: MeasureConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens: the prompt, and those that are decoded after it."""
    shape = (cfg.batch_size, cfg.prompt_len + cfg.warmup + cfg.decode_tokens)
    tokens = torch.randint(_vocabulary(model), shape, generator=torch.Generator().manual_seed(seed))
    prompt, rest = tokens.to(next(model.parameters()).device).tensor_split([cfg.prompt_len], dim=1)
    return prompt, rest


def _prefill(model: nn.Module, prompt: Tensor, cache: MakeCache | None) -> Callable[[], Any]:
    accepted = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    make = cache or (lambda: None)  # without one, the model makes its own
    return lambda: model(input_ids=prompt, past_key_values=make(), use_cache=True, **last_only).past_key_values


def _decoder(model: nn.Module, cache: Any, tokens: Tensor) -> Callable[[], Any]:
    columns = iter(tokens.split(1, dim=1))
    return lambda: model(input_ids=next(columns), past_key_values=cache, use_cache=True)


def _interleave(
    pair: list[Callable[[], Any]], warmup: int, repeats: int, device: torch.device, track: Track
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Milliseconds (repeats, 2) of the two calls, run in turn and in alternating order."""
    times = np.empty((warmup + repeats, 2))
    for i in track(range(warmup + repeats), "latency", warmup + repeats):
        for which in (0, 1) if i % 2 else (1, 0):
            times[i, which] = _milliseconds(pair[which], device)
    return times[warmup:]


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _summary(name: str, times: np.ndarray[Any, np.dtype[np.float64]]) -> Metrics:
    percentiles = {f"{name}_ms_p{p}": float(np.percentile(times[:, 0], p)) for p in (50, 10, 90)}
    return percentiles | {
        f"baseline_{name}_ms_p50": float(np.median(times[:, 1])),
        f"{name}_speedup": float(np.median(times[:, 1] / times[:, 0])),
    }


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
