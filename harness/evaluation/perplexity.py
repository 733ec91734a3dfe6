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

_LOGIT_ELEMENTS = 2**24  # logits that may be in memory at once: 64 MiB of float32
_SAME_SPLIT = 1e-4  # relative error: the tail gets the same states either way, so only rounding can differ
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

    The constructor checks on the tokens `probe` (1, T) that the two parts give the model's logits. If they do not, or
    the model has no body, the whole model runs, one window at a time: then its logits are the states, and the tail
    returns them unchanged. With `cache`, each batch uses a new cache; without it, keys and values are not stored.
    """

    def __init__(self, model: nn.Module, probe: Tensor, cache: MakeCache | None = None) -> None:
        self.model: Any = model
        self._cache: MakeCache | None = None  # the check runs without a cache
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
        return [self.model(input_ids=window[None], **self._cache_options()).logits[0] for window in tokens]

    def tail(self, states: Tensor) -> Tensor:
        """Logits (T, V) of states (T, D): the part of the model after its body."""
        return states if self._tail is None else self._tail(states)

    def slices(self, states: Tensor, tokens: Tensor, unscored: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices of logits (n, V), at least float32, that predict tokens[1 + unscored:], each with its targets (n,)."""
        states, targets = states[unscored:-1], tokens[unscored + 1 :]
        size = max(1, _LOGIT_ELEMENTS // self.tail(states[:1]).shape[-1])
        for states_slice, targets_slice in zip(states.split(size), targets.split(size), strict=True):
            logits = self.tail(states_slice)
            yield logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_slice

    def _body(self, tokens: Tensor) -> Any:
        return self.model.base_model(input_ids=tokens, **self._cache_options())

    def _cache_options(self) -> dict[str, Any]:
        """Keyword arguments of the model's call: a new cache, or no cache."""
        return {"use_cache": True, "past_key_values": self._cache()} if self._cache else {"use_cache": False}

    def _proved_tail(self, probe: Tensor) -> Tail | None:
        """The tail, None if the model has no body or the two parts do not give its logits."""
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
    """The scorer of a model, checked on the first tokens of `windows` (W, T)."""
    return Scorer(model, windows[:1, :PROBE_TOKENS].to(next(model.parameters()).device), cache)


@torch.inference_mode()
def perplexity(  # noqa: PLR0913 - the options of one pass
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 1,
    track: Track = silent,
    keep: Callable[[Tensor], None] | None = None,
    cache: MakeCache | None = None,
    unscored: int = 0,
) -> Perplexity:
    """Perplexity of `model` on `windows` (W, T) int64; each scores its last T - 1 tokens without the first `unscored`.

    Protocol gptq (Frantar et al. 2022; IST-DASLab/gptq opt.py): windows are independent, cross-entropy is in float32
    (float64 for a float64 model), the mean is over windows. Protocol strided (transformers' guide to perplexity; HQQ's
    authors): windows overlap, and tokens that an earlier window scored are only context; here the first window leaves
    as many unscored, so that all windows weigh the same. Logits are computed in slices, so memory is bounded for any
    vocabulary. The result does not depend on `batch_size`. `keep` gets the last hidden states (T, D) of each window.
    Raises: ValueError if the model's logits are not finite.
    """
    device = next(model.parameters()).device
    parts = scorer(model, windows, cache)
    window_nll: list[float] = []
    size = batch_size if parts.splits else 1
    for batch in track(windows.split(size), "perplexity", -(-len(windows) // size)):
        tokens = batch.to(device)
        for states, window in zip(parts.states(tokens), tokens, strict=True):
            window_nll.append(_mean_nll(parts, states, window, unscored))
            if keep is not None:
                keep(states)
    _check_finite(window_nll)
    return Perplexity(window_nll)


def _mean_nll(parts: Scorer, states: Tensor, tokens: Tensor, unscored: int) -> float:
    """Mean nll of tokens[1 + unscored:] under the logits of `states` (T, D)."""
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for logits, targets in parts.slices(states, tokens, unscored):
        total += F.cross_entropy(logits, targets, reduction="sum").double()
    return float(total) / (len(tokens) - 1 - unscored)


def _check_finite(window_nll: list[float]) -> None:
    for i, nll in enumerate(window_nll):
        if not math.isfinite(nll):
            raise ValueError(f"perplexity is not finite: window {i} has NaN or infinite logits")
