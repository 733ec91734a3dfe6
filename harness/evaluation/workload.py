"""The calls whose latency and energy are measured: prefills of random tokens, and decode steps after them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.config import MeasureConfig
from harness.nn import MakeCache, accepted, cache_of

Pair = tuple[nn.Module, nn.Module]  # the quantized model, and its float baseline


def random_tokens(model: nn.Module, cfg: MeasureConfig, seed: int) -> tuple[Tensor, Tensor]:
    """The prompt (B, `prompt_len`), and the tokens (B, warmup + decode_tokens) that are decoded after it."""
    shape = (cfg.batch_size, cfg.prompt_len + cfg.warmup + cfg.decode_tokens)
    tokens = torch.randint(_vocabulary(model), shape, generator=torch.Generator().manual_seed(seed))
    prompt, decoded = tokens.to(next(model.parameters()).device).tensor_split([cfg.prompt_len], dim=1)
    return prompt, decoded


def prefill_call(model: nn.Module, prompt: Tensor, cache: MakeCache | None) -> Callable[[], Any]:
    """A prefill into a new cache, which it returns; only the last logits are computed where the model allows that.

    The call returns None if the model's output has no cache.
    """
    options = accepted(model, use_cache=True)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1

    def call() -> Any:
        made = {"past_key_values": cache()} if cache else {}  # without it, the model makes a float cache
        return cache_of(model(input_ids=prompt, **options, **made))

    return call


def decode_call(model: nn.Module, cache: Any, tokens: Tensor) -> Callable[[], Any]:
    """A decode step: each call adds the next column of `tokens` (B, steps) to the cache.

    Raises: ValueError if `cache` is None.
    """
    if cache is None:
        raise ValueError(f"{type(model).__name__} returns no past_key_values")
    columns = iter(tokens.split(1, dim=1))
    return lambda: model(input_ids=next(columns), past_key_values=cache, use_cache=True)


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, with all work that it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all work; does nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)
