"""Perplexity over a fixed stream of windows, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import PROBE_TOKENS, SAME_LOGITS, Tail, relative_error
from harness.nn import MakeCache, accepted, hooked
from harness.utils.progress import Track, silent

_LOGIT_ELEMENTS = 2**24  # logits that may be in memory at once: 64 MiB of float32
_SAME_SPLIT = 1e-4  # relative error: the tail gets the same states either way, so only rounding can differ
_MAX_EXPONENT = 700.0
_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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

    The body is a module that the model's forward calls, discovered on the tokens `probe` (1, T). The constructor checks
    that the two parts give the model's logits, also for each position alone. If no module passes, the whole model runs,
    one window at a time: then its logits are the states, and the tail returns them unchanged. With `cache`, each batch
    uses a new cache; without it, keys and values are not stored.
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
        if self._tail is not None:
            return list(self._states(self._tail.modules[0], tokens))
        return [self.model(input_ids=window[None], **self._cache_options()).logits[0] for window in tokens]

    def tail(self, states: Tensor) -> Tensor:
        """Logits (T, V) of states (T, D): the part of the model after its body."""
        return states if self._tail is None else self._tail(states)

    def slices(self, states: Tensor, tokens: Tensor, unscored: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Slices of logits (n, V), at least float32, that predict tokens[1 + unscored:], each with its targets (n,)."""
        states, targets = states[unscored:-1], tokens[unscored + 1 :]
        size = max(1, _LOGIT_ELEMENTS // self.tail(states[:1]).shape[-1])
        for states_slice, targets_slice in zip(states.split(size), targets.split(size), strict=True):
            yield self.logits(states_slice), targets_slice

    def logits(self, states: Tensor) -> Tensor:
        """Logits (n, V), at least float32, of states (n, D)."""
        logits = self.tail(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _states(self, body: nn.Module, tokens: Tensor) -> Tensor:
        """The states (B, T, D) that `body` returns; the model's forward ends there."""
        outputs: list[Any] = []

        def end(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(output)
            raise _Ended

        with hooked([body.register_forward_hook(end)]), suppress(_Ended):
            self.model(input_ids=tokens, **self._cache_options())
        states: Tensor = _first_tensor(outputs[0])
        return states

    def _cache_options(self) -> dict[str, Any]:
        """Keyword arguments of the model's call: a new cache, or no cache."""
        if self._cache:
            return {"use_cache": True, "past_key_values": self._cache()}
        return accepted(self.model, use_cache=False)

    def _proved_tail(self, probe: Tensor) -> Tail | None:
        """The tail, None if no module is a body: if none gives the model's logits in two parts."""
        called, whole = self._outermost(probe)
        base = getattr(self.model, "base_model", None)

        def rank(index: int) -> tuple[bool, int, int]:  # the base model first, then narrow states, then late modules
            return called[index][0] is not base, _first_tensor(called[index][1]).shape[-1], -index

        for body, output in (called[index] for index in sorted(range(len(called)), key=rank)):
            tail, states = Tail(self.model, [body], partial(_with_states, output)), _first_tensor(output)[0]
            if self._agrees(tail, states, whole):
                return tail
        return None

    def _outermost(self, probe: Tensor) -> tuple[list[tuple[nn.Module, Any]], Tensor]:
        """The modules that the model's forward itself calls, once each, and that return states; and the logits."""
        calls: list[tuple[nn.Module, Any]] = []
        depth = [0]

        def enter(_module: nn.Module, _args: Any) -> None:
            depth[0] += 1

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            depth[0] -= 1
            if not depth[0]:
                calls.append((module, output))

        inner = [module for module in self.model.modules() if module is not self.model]
        entered = [module.register_forward_pre_hook(enter) for module in inner]
        with hooked([*entered, *(module.register_forward_hook(leave) for module in inner)]):
            whole = self.model(input_ids=probe, **self._cache_options()).logits[0]
        counts = Counter(module for module, _ in calls)
        return [call for call in calls if counts[call[0]] == 1 and _is_states(call[1], probe)], whole

    def _agrees(self, tail: Tail, states: Tensor, whole: Tensor) -> bool:
        """Whether `tail` gives the logits `whole` (T, V) of all states (T, D), and of the second half of them alone."""
        try:
            split, middle = tail(states), len(states) // 2
            alone = tail(states[middle:])
        except _UNFIT:
            return False
        if split.shape != whole.shape or alone.shape != whole[middle:].shape:
            return False
        differs = relative_error(split, whole) > _SAME_SPLIT  # NaN does not differ: it is reported later
        return not differs and not relative_error(alone, whole[middle:]) > SAME_LOGITS[whole.dtype]


class _Ended(Exception):  # noqa: N818 - not an error: the body has returned
    """Ends a forward early."""


def _first_tensor(output: Any) -> Any:
    """The hidden states in the output of a module: the output itself, or the first item of a tuple or ModelOutput."""
    return output if isinstance(output, Tensor) else output[0] if output else None


def _is_states(output: Any, probe: Tensor) -> bool:
    """Whether a module returned hidden states (1, T, D) of the tokens `probe` (1, T)."""
    if not isinstance(output, Tensor | tuple | list | Mapping):
        return False
    states = _first_tensor(output if not isinstance(output, Mapping) else tuple(output.values()))
    return isinstance(states, Tensor) and states.is_floating_point() and states.shape[:-1] == probe.shape


def _with_states(output: Any, states: Tensor) -> Any:
    """An output of the same kind as that of a body, with other states and without anything else."""
    if isinstance(output, Tensor):
        return states
    if isinstance(output, Mapping):
        return type(output)(**{next(iter(output)): states})
    return type(output)((states, *[None] * (len(output) - 1)))


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
    parts = scorer(model, windows, cache)
    window_nll: list[float] = []
    for states, window in last_states(parts, windows, batch_size, track):
        window_nll.append(mean_nll(parts, states, window, unscored))
        if keep is not None:
            keep(states)
    check_finite(window_nll)
    return Perplexity(window_nll)


@torch.inference_mode()
def last_states(
    parts: Scorer, windows: Tensor, batch_size: int = 1, track: Track = silent
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the body on `windows` (W, T), and yield the last hidden states (T, D) and the tokens (T,) of each window."""
    device = next(parts.model.parameters()).device
    size = batch_size if parts.splits else 1
    for batch in track(windows.split(size), "perplexity", -(-len(windows) // size)):
        tokens = batch.to(device)
        yield from zip(parts.states(tokens), tokens, strict=True)


@torch.inference_mode()
def mean_nll(parts: Scorer, states: Tensor, tokens: Tensor, unscored: int = 0) -> float:
    """Mean nll of tokens[1 + unscored:] under the logits of `states` (T, D)."""
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for logits, targets in parts.slices(states, tokens, unscored):
        total += F.cross_entropy(logits, targets, reduction="sum").double()
    return float(total) / (len(tokens) - 1 - unscored)


def check_finite(window_nll: Sequence[float], first: int = 0) -> None:
    """Raise a ValueError if the nll of a window is not finite; `first` is the index of the first one."""
    for i, nll in enumerate(window_nll):
        if not math.isfinite(nll):
            raise ValueError(f"perplexity is not finite: window {first + i} has NaN or infinite logits")
