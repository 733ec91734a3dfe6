"""Perplexity over a fixed stream of windows, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import PROBE_TOKENS, relative_error
from harness.evaluation.tail import Tail
from harness.nn import MakeCache
from harness.utils.progress import Track, silent

_LOGIT_ELEMENTS = 2**24  # logits that may exist at once: 64 MiB of float32
_SAME_SPLIT = 1e-4  # the tail sees the same states either way, so only rounding may differ
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


class Scorer:
    """A model in two parts: a body, from tokens to last hidden states, and a tail, from states (T, D) to logits (T, V).

    The split is proved on `probe` (1, T) tokens to give the model's logits. Where it does not, or where a model has no
    body, the model runs whole, one window at a time: its logits are the states, and the tail returns them unchanged.
    With `cache`, each batch goes through a new one; without, keys and values are not kept.
    """

    def __init__(self, model: nn.Module, probe: Tensor, cache: MakeCache | None = None) -> None:
        self.model: Any = model
        self._cache: MakeCache | None = None  # the proof is for the model without one
        self._tail = self._proved_tail(probe)
        self._cache = cache

    @property
    def splits(self) -> bool:
        """Whether the model runs in two parts."""
        return self._tail is not None

    def states(self, tokens: Tensor) -> list[Tensor]:
        """Last hidden states (T, D) of each window of `tokens` (B, T)."""
        if self.splits:
            return list(self._body(tokens)[0])
        return [self.model(input_ids=window[None], **self._caching()).logits[0] for window in tokens]

    def tail(self, states: Tensor) -> Tensor:
        """Logits (T, V) of states (T, D): what the model does after its body."""
        return states if self._tail is None else self._tail(states)

    def slices(self, states: Tensor, tokens: Tensor, unscored: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (n, V), at least float32, that score tokens[1 + unscored:], and those n tokens; some at a time."""
        states, targets = states[unscored:-1], tokens[unscored + 1 :]
        size = max(1, _LOGIT_ELEMENTS // self.tail(states[:1]).shape[-1])
        for part, wanted in zip(states.split(size), targets.split(size), strict=True):
            logits = self.tail(part)
            yield logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted

    def _body(self, tokens: Tensor) -> Any:
        return self.model.base_model(input_ids=tokens, **self._caching())

    def _caching(self) -> dict[str, Any]:
        """Options of the model's call: a new cache, or none."""
        return {"use_cache": True, "past_key_values": self._cache()} if self._cache else {"use_cache": False}

    def _proved_tail(self, probe: Tensor) -> Tail | None:
        body = getattr(self.model, "base_model", self.model)
        if body is self.model:
            return None
        whole = self.model(input_ids=probe, use_cache=False).logits[0]
        output = self._body(probe)
        output_class = type(output)
        tail = Tail(self.model, [body], lambda states: output_class(last_hidden_state=states))
        split = tail(output[0][0])
        differs = split.shape != whole.shape or relative_error(split, whole) > _SAME_SPLIT  # NaN is reported later
        return None if differs else tail


@torch.inference_mode()
def scorer(model: nn.Module, windows: Tensor, cache: MakeCache | None = None) -> Scorer:
    """The scorer of a model, proved on the start of `windows` (W, T)."""
    return Scorer(model, windows[:1, :PROBE_TOKENS].to(next(model.parameters()).device), cache)


@torch.inference_mode()
def perplexity(  # noqa: PLR0913 - one pass, and all that may be asked of it
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 1,
    track: Track = silent,
    keep: Callable[[Tensor], None] | None = None,
    cache: MakeCache | None = None,
    unscored: int = 0,
) -> Perplexity:
    """Perplexity of `model` on `windows` (W, T) int64; each scores its last T - 1 tokens, less the first `unscored`.

    Protocol gptq (Frantar et al. 2022; IST-DASLab/gptq opt.py): windows are independent, cross-entropy is in
    float32 (float64 for a float64 model), the mean is over windows. Protocol strided (transformers' guide to
    perplexity; HQQ's authors): windows overlap, and what an earlier one scored is context alone; here that of the
    first window is not scored either, so that all windows weigh the same. Logits exist for a slice of positions at a
    time, so memory stays bounded for any vocabulary. The result does not depend on `batch_size`. `keep` is given the
    last hidden states (T, D) of each window, in order; with `cache`, each batch goes through a fresh one.
    Raises: ValueError if the model's logits are not finite.
    """
    device = next(model.parameters()).device
    scored = scorer(model, windows, cache)
    window_nll: list[float] = []
    size = batch_size if scored.splits else 1
    for batch in track(windows.split(size), "perplexity", -(-len(windows) // size)):
        tokens = batch.to(device)
        for states, window in zip(scored.states(tokens), tokens, strict=True):
            window_nll.append(_mean_nll(scored, states, window, unscored))
            if keep is not None:
                keep(states)
    if not all(map(math.isfinite, window_nll)):
        raise ValueError(f"perplexity is not finite: window {_first_bad(window_nll)} has NaN or infinite logits")
    return Perplexity(window_nll)


def _mean_nll(scored: Scorer, states: Tensor, tokens: Tensor, unscored: int) -> float:
    """Mean nll of tokens[1 + unscored:] given `states` (T, D)."""
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for logits, wanted in scored.slices(states, tokens, unscored):
        total += F.cross_entropy(logits, wanted, reduction="sum").double()
    return float(total) / (len(tokens) - 1 - unscored)


def _first_bad(values: list[float]) -> int:
    return next(i for i, value in enumerate(values) if not math.isfinite(value))
