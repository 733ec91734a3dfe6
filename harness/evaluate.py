"""Perplexity over a fixed stream of windows, by the GPTQ protocol, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.architecture import standing_in
from harness.progress import Track, silent

_LOGIT_ELEMENTS = 2**24  # logits that may exist at once: 64 MiB of float32
_PROBE_TOKENS = 16
_SAME_LOGITS = 1e-4  # relative; the tail sees the same states either way, so rounding alone may differ
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
    split = _splits(model, windows[:1, :_PROBE_TOKENS].to(device))
    window_nll: list[float] = []
    size = batch_size if split else 1
    for batch in track(windows.split(size), "perplexity", -(-len(windows) // size)):
        tokens = batch.to(device)
        if split:
            output = _body(model, tokens)
            window_nll += [_mean_nll(_tail(model, output), *pair) for pair in zip(output[0], tokens, strict=True)]
        else:
            logits = model(input_ids=tokens, use_cache=False).logits[0]
            window_nll.append(_mean_nll(lambda part: part, logits, tokens[0]))
    if not all(map(math.isfinite, window_nll)):
        raise ValueError(f"perplexity is not finite: window {_first_bad(window_nll)} has NaN or infinite logits")
    return Perplexity(window_nll)


def _splits(model: nn.Module, probe: Tensor) -> bool:
    """Whether body and tail, run apart, are proved on `probe` to give the model's logits; if not, it is run whole."""
    if getattr(model, "base_model", model) is model:
        return False
    whole = model(input_ids=probe, use_cache=False).logits[0]
    output = _body(model, probe)
    apart = _tail(model, output)(output[0][0])
    return apart.shape == whole.shape and not bool((apart - whole).norm() > _SAME_LOGITS * whole.norm())


def _body(model: Any, tokens: Tensor) -> Any:
    """The output of all that comes before the head; its first item is the last hidden states (B, T, D)."""
    return model.base_model(input_ids=tokens, use_cache=False)


def _tail(model: Any, output: Any) -> Callable[[Tensor], Tensor]:
    """What the model does after its body (head, scaling, capping), as states (T, D) to logits (T, V).

    It is the model's own forward, with the body standing in for itself by handing out given states.
    """
    body = model.base_model

    def logits(states: Tensor) -> Tensor:
        given = type(output)(last_hidden_state=states[None])
        tokens = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        with standing_in(body, lambda *_args, **_options: given):
            found: Tensor = model(input_ids=tokens, use_cache=False).logits[0]
        return found

    return logits


def _mean_nll(tail: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor) -> float:
    """Mean nll of tokens[1:] given `states` (T, D), of which `tail` sees a slice of positions at a time."""
    states, targets = states[:-1], tokens[1:]
    width = tail(states[:1]).shape[-1]
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for part, wanted in zip(*(x.split(max(1, _LOGIT_ELEMENTS // width)) for x in (states, targets)), strict=True):
        logits = tail(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, wanted, reduction="sum").double()
    return float(total) / len(targets)


def _first_bad(values: list[float]) -> int:
    return next(i for i, value in enumerate(values) if not math.isfinite(value))
