"""Latency beside the float model in one run, and the peak memory of the process."""

from __future__ import annotations

import ctypes
import gc
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.config import MeasureConfig
from harness.progress import Track, silent

Metrics = dict[str, float]
_MIB = 2**20


@torch.inference_mode()
def latency(model: nn.Module, baseline: nn.Module, cfg: MeasureConfig, seed: int, track: Track = silent) -> Metrics:
    """Time prefill and decode of `model`, each repetition paired with one of `baseline`.

    Prefill reads `prompt_len` tokens for `batch_size` sequences into a fresh KV cache and computes the last
    logits. Decode then adds one token a step to that cache. Pairs run back to back in alternating order, so
    that a slow spell of the machine falls on both; a speedup is the median of the pairs' ratios.

    Returns: p50, p10 and p90 in milliseconds, of the baseline too, and the speedups.
    """
    device = next(model.parameters()).device
    prompt, rest = _tokens(model, cfg, seed)
    both = (model, baseline)

    prefills = [_prefill(each, prompt) for each in both]
    metrics = _summary("prefill", _interleave(prefills, cfg.warmup, cfg.repeats, device, track))
    steps = [_decoder(each, prefill(), rest) for each, prefill in zip(both, prefills, strict=True)]
    return metrics | _summary("decode", _interleave(steps, cfg.warmup, cfg.decode_tokens, device, track))


@torch.inference_mode()
def prefill(model: nn.Module, cfg: MeasureConfig, seed: int) -> None:
    """Run the prefill that is timed once, untimed."""
    _prefill(model, _tokens(model, cfg, seed)[0])()


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


def _prefill(model: nn.Module, prompt: Tensor) -> Callable[[], Any]:
    accepted = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    return lambda: model(input_ids=prompt, use_cache=True, **last_only).past_key_values


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
            _synchronize(device)
            start = time.perf_counter()
            pair[which]()
            _synchronize(device)
            times[i, which] = 1e3 * (time.perf_counter() - start)
    return times[warmup:]


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
