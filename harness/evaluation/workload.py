"""The calls whose latency and energy are measured: prefills of random tokens, and decode steps after them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from harness.config import MeasureConfig
from harness.nn import MakeCache, accepted, cache_of


class Workload(Protocol):
    """The timed calls of one model: a prompt (B, P), and the tokens (B, steps) that are decoded after it."""

    @property
    def prompt(self) -> Tensor: ...

    @property
    def decoded(self) -> Tensor: ...

    def prefill(self) -> Any:
        """Read the prompt into an empty cache, compute its last logits, and return the cache; None if there is none."""

    def decode(self, cache: Any) -> Callable[[], Any]:
        """A decode step after a prefill that returned `cache`: each call adds the next of the decoded tokens.

        Raises: ValueError if `cache` is None.
        """


Pair = tuple[Workload, Workload]  # of the quantized model, and of its float baseline


@dataclass(frozen=True)
class Eager:
    """The calls as the model's forward runs them, operator by operator, with a cache that grows."""

    model: nn.Module
    prompt: Tensor
    decoded: Tensor
    cache: MakeCache | None = None  # None: the model makes a float cache

    def prefill(self) -> Any:
        made = {"past_key_values": self.cache()} if self.cache else {}
        options = accepted(self.model, use_cache=True)
        return cache_of(self.model(input_ids=self.prompt, **options, **made, **last_logits(self.model)))

    def decode(self, cache: Any) -> Callable[[], Any]:
        if cache is None:
            raise ValueError(f"{type(self.model).__name__} returns no past_key_values")
        columns = iter(self.decoded.split(1, dim=1))
        return lambda: self.model(input_ids=next(columns), past_key_values=cache, use_cache=True)


def last_logits(model: nn.Module) -> dict[str, int]:
    """The option with which the model computes the logits of the last token alone; empty if it has no such option."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def random_tokens(model: nn.Module, cfg: MeasureConfig, seed: int) -> tuple[Tensor, Tensor]:
    """The prompt (B, `prompt_len`), and the tokens (B, warmup + decode_tokens) that are decoded after it."""
    shape = (cfg.batch_size, cfg.prompt_len + cfg.warmup + cfg.decode_tokens)
    tokens = torch.randint(_vocabulary(model), shape, generator=torch.Generator().manual_seed(seed))
    prompt, decoded = tokens.to(next(model.parameters()).device).tensor_split([cfg.prompt_len], dim=1)
    return prompt, decoded


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
