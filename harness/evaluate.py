"""Perplexity over a fixed stream of windows, by the GPTQ protocol, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.progress import Track, silent

_LOGIT_ELEMENTS = 2**24  # logits that may exist at once: 64 MiB of float32
_PROBE_TOKENS = 16
_SAME_LOGITS = 1e-4  # relative; the head sees the same states either way, so rounding alone may differ
_MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class Perplexity:
    """nll is the mean over windows of each window's mean negative log likelihood, in nats a token."""

    window_nll: list[float]

    @property
    def nll(self) -> float:
        return math.fsum(self.window_nll) / len(self.window_nll)

    @property
    def perplexity(self) -> float | None:
        """exp(nll); None if that exceeds the range of a float."""
        return math.exp(self.nll) if self.nll < _MAX_EXPONENT else None


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int = 1, track: Track = silent) -> Perplexity:
    """Perplexity of `model` on `windows` (W, T) int64; each window scores its T - 1 last tokens.

    Protocol gptq (Frantar et al. 2022; IST-DASLab/gptq opt.py): windows are independent, cross-entropy is in
    float32 (float64 for a float64 model), the mean is over windows. Logits exist for a slice of positions at a
    time, so memory stays bounded for any vocabulary. The result does not depend on `batch_size`.
    Raises: ValueError if the model's logits are not finite.
    """
    device = next(model.parameters()).device
    head = _split_head(model, windows[:1, :_PROBE_TOKENS].to(device))
    window_nll: list[float] = []
    for batch in track(windows.split(batch_size), "perplexity", -(-len(windows) // batch_size)):
        tokens = batch.to(device)
        states = _states(model, tokens) if head else model(input_ids=tokens, use_cache=False).logits
        window_nll += [_mean_nll(head or nn.Identity(), *pair) for pair in zip(states, tokens, strict=True)]
    if not all(map(math.isfinite, window_nll)):
        raise ValueError(f"perplexity is not finite: window {_first_bad(window_nll)} has NaN or infinite logits")
    return Perplexity(window_nll)


def _split_head(model: nn.Module, probe: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The output head, if head(last hidden state) is proved on `probe` to be the model's logits; else None.

    A model that caps or scales its logits afterwards fails the proof, and is run as a whole.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module) or getattr(model, "base_model", model) is model:
        return None
    split, whole = head(_states(model, probe)), model(input_ids=probe, use_cache=False).logits
    same = split.shape == whole.shape and bool((split - whole).norm() <= _SAME_LOGITS * whole.norm())
    return head if same else None


def _states(model: nn.Module, tokens: Tensor) -> Tensor:
    """Last hidden states (B, T, D)."""
    whole: Any = model
    states: Tensor = whole.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return states


def _mean_nll(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor) -> float:
    """Mean nll of tokens[1:] given `states` (T, D), whose `head` is applied to a slice of positions at a time."""
    states, targets = states[:-1], tokens[1:]
    width = head(states[:1]).shape[-1]
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for part, wanted in zip(*(x.split(max(1, _LOGIT_ELEMENTS // width)) for x in (states, targets)), strict=True):
        logits = head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, wanted, reduction="sum").double()
    return float(total) / len(targets)


def _first_bad(values: list[float]) -> int:
    return next(i for i, value in enumerate(values) if not math.isfinite(value))
