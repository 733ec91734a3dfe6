"""How good a quantized model is: its scores, its divergence from the float model, its memory and its times."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration import SAME_NLL
from harness.config import RunConfig
from harness.evaluation import divergence, perplexity
from harness.evaluation.energy import energy, meter
from harness.evaluation.hidden_states import FloatStates, Spool, spool
from harness.evaluation.latency import latency, prefill
from harness.evaluation.memory import peak_memory_mib, reset_peak_memory
from harness.models import Source
from harness.nn import kvcache
from harness.utils.digests import sha256
from harness.utils.disk_cache import DiskCache, cache_dir
from harness.utils.progress import Track


@dataclass(frozen=True)
class Scores:
    """Perplexity with the nll of each window, and the memory of that pass; without text, of one prefill."""

    window_nll: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    kv: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Diverged:
    """Divergence from the float model; empty, with a warning, where the states of both found no room on the disk."""

    window_kl: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """Times and energy of the model and of its baseline; `energy_source` names the counter, where there is one."""

    metrics: dict[str, float]
    energy_source: str | None


@dataclass
class Assessment:
    """The stages after quantization, on one model; a context, whose end removes the hidden states from the disk.

    windows, tokens_sha256  the evaluation tokens (W, T) and their hash
    simulated               whether decoded floats run: then memory and times say nothing about the format

    `score` comes first, then `load_baseline` where `needs_baseline`, then `diverge` and `time`.
    """

    cfg: RunConfig
    source: Source
    model: nn.Module
    windows: Tensor
    tokens_sha256: str
    simulated: bool
    track: Track

    def __post_init__(self) -> None:
        self._stack = ExitStack()
        self._states: Spool | None = None
        self._baseline: nn.Module | None = None
        self._nll = math.nan

    def __enter__(self) -> Assessment:
        if self.diverges:
            self._states = self._stack.enter_context(self._spool())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def diverges(self) -> bool:
        return self.cfg.measure.divergence and self.cfg.model.scored

    @property
    def times(self) -> bool:
        return self.cfg.measure.latency and not self.simulated

    @property
    def needs_baseline(self) -> bool:
        return self.diverges or self.times

    @property
    def is_baseline(self) -> bool:
        """Whether the model is the float model that others are compared with."""
        return not self.cfg.steps and self.cfg.kv is None and self._same_dtype

    def score(self) -> Scores:
        """Perplexity, keeping the hidden states that it follows from, and the peak of memory meanwhile.

        Raises: ValueError if logits are not finite.
        """
        warning = reset_peak_memory(self._device)
        scores = self._perplexity() if self.cfg.model.scored else None
        if scores is None:
            prefill(self.model, self.cfg.measure, self.cfg.seed, kvcache.maker(self.cfg.kv))
        memory, kv, warnings = dict[str, float](), list[dict[str, float]](), list[str]()
        if not self.simulated:
            memory["peak_memory_mib"] = peak_memory_mib(self._device)
            warnings += [warning] if warning else []
            bytes_per_token, kv = kvcache.footprint(self.model, self.cfg.kv)
            memory |= {} if bytes_per_token is None else {"kv_bytes_per_token": bytes_per_token}
        if scores is None:
            name = self.cfg.model.name
            warnings.append(f"model={name} has random weights: no perplexity is computed, it means nothing")
            return Scores(metrics=memory, kv=kv, warnings=warnings)
        self._nll = scores.nll
        metrics = memory | {"nll": scores.nll}
        if scores.perplexity is None:
            warnings.append(f"perplexity is beyond the range of a float; nll={scores.nll:.6g} says how far")
        else:
            metrics["perplexity"] = scores.perplexity
        return Scores(scores.window_nll, metrics, kv, warnings)

    @torch.inference_mode()
    def load_baseline(self) -> None:
        """Load the float model; the model itself stands for it where its tail is the same and nothing is timed."""
        if not self.times and self._same_dtype:
            tail = perplexity.scorer(self.model, self.windows).tail
            if self.is_baseline or self._shared().vouch_for(tail):
                self._baseline = self.model
                return
        self._baseline = self.source.load(self._baseline_dtype, self._device)

    def diverge(self) -> Diverged:
        """Divergence from the float model, by the last hidden states of both."""
        assert self._states is not None
        assert self._baseline is not None
        shared = self._shared()
        reference, scorer = (perplexity.scorer(model, self.windows) for model in (self._baseline, self.model))
        with self._spool() as expected:
            if self.is_baseline:
                expected = self._states
            else:
                shared.fill(expected, partial(self._float_pass, expected))
            refused = self._states.refused or expected.refused
            if refused:
                return Diverged(warnings=[self._no_room(refused)])
            if self._baseline is not self.model or self.is_baseline:
                with torch.inference_mode():
                    shared.publish(expected, reference.tail)
            pair = (reference, expected), (scorer, self._states)
            result = divergence.compare(*pair, self.windows, self.track, self.cfg.data.unscored)
        if not math.isclose(result.nll, self._nll, rel_tol=SAME_NLL):
            raise ValueError(f"the divergence pass gave nll={result.nll}, the perplexity pass {self._nll}")
        return Diverged(result.window_kl, result.metrics)

    def time(self) -> Timing:
        """Times, the memory of the cache, and joules where the machine has a counter that may be read."""
        assert self._baseline is not None
        cache, counter = kvcache.maker(self.cfg.kv), meter(self._device)
        pair = (self.model, self._baseline)
        metrics = latency(pair, self.cfg.measure, self.cfg.seed, self.track, cache)
        if counter is None:
            return Timing(metrics, None)
        return Timing(metrics | energy(pair, self.cfg.measure, self.cfg.seed, counter, cache), counter.source)

    def _perplexity(self) -> perplexity.Perplexity:
        keep = None if self._states is None else self._states.append
        data, cache = self.cfg.data, kvcache.maker(self.cfg.kv)
        return perplexity.perplexity(self.model, self.windows, data.batch_size, self.track, keep, cache, data.unscored)

    def _float_pass(self, expected: Spool, keep: Callable[[Tensor], None]) -> None:
        """Hand the float model's states to `keep`; where it was not loaded, because its states were cached, say so."""
        if self._baseline is self.model:
            expected.refused = "another run has taken the place of the float model's states"
        else:
            assert self._baseline is not None
            perplexity.perplexity(self._baseline, self.windows, self.cfg.data.batch_size, self.track, keep)

    def _no_room(self, reason: str) -> str:
        return (
            f"measure.divergence_gib={self.cfg.measure.divergence_gib:g} leaves no room for states ({reason}): "
            "no divergence is measured; free space, raise it or lower data.max_windows"
        )

    def _shared(self) -> FloatStates:
        """The float model's states for these windows, which all runs share."""
        cache = DiskCache(cache_dir() / "float_states", self._room)
        return FloatStates(cache, self._float_identity(), len(self.windows))

    def _float_identity(self) -> list[str]:
        """What the float model's states follow from, besides the machine."""
        data = self.cfg.data
        names = [self.source.fingerprint, self.tokens_sha256, str(data.seq_len), _name(self._baseline_dtype)]
        code = sha256(Path(perplexity.__file__).read_bytes())
        return [*names, str(self._device), str(data.batch_size), code]

    def _spool(self) -> AbstractContextManager[Spool]:
        return spool(cache_dir() / "spool", self._room)

    @property
    def _room(self) -> int:
        return int(self.cfg.measure.divergence_gib * 2**30)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _baseline_dtype(self) -> torch.dtype:
        return self.source.dtype(self.cfg.model.baseline_dtype)

    @property
    def _same_dtype(self) -> bool:
        return self.source.dtype(self.cfg.model.dtype) == self._baseline_dtype


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
