"""The assessment of a quantized model: perplexity, divergence from the float model, memory, latency and energy."""

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
from harness.evaluation.missing import optional
from harness.models import Source
from harness.nn import kvcache, one_line_errors
from harness.utils.digests import sha256
from harness.utils.disk_cache import DiskCache, cache_dir
from harness.utils.progress import Track


@dataclass(frozen=True)
class Scores:
    """Perplexity with the nll of each window, and the memory of that pass, or of one prefill if no text is scored."""

    window_nll: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    kv: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Diverged:
    """Divergence from the float model; empty, with a warning, if the states of both models did not fit on the disk."""

    window_kl: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Timing:
    """Latency and energy of the model and of its baseline; `energy_source` names the counter, if there is one."""

    metrics: dict[str, float] = field(default_factory=dict)
    energy_source: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Assessment:
    """The stages after quantization, for one model; a context manager that deletes the hidden states on exit.

    windows, tokens_sha256  the evaluation tokens (W, T) and their hash
    simulated               whether the model runs on decoded floats: then its memory and latency are not the format's

    Call `score` first, then `load_baseline` if `needs_baseline`, then `diverge` and `time`.
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
        """Whether the model is itself the float model that quantized models are compared with."""
        return not self.cfg.steps and self.cfg.kv is None and self._same_dtype

    def score(self) -> Scores:
        """Measure perplexity, store the last hidden states for `diverge`, and measure peak memory during the pass.

        Raises: ValueError if logits are not finite.
        """
        warning = reset_peak_memory(self._device)
        result = self._perplexity() if self.cfg.model.scored else None
        if result is None:
            prefill(self.model, self.cfg.measure, self.cfg.seed, kvcache.maker(self.cfg.kv))
        memory, kv, warnings = dict[str, float](), list[dict[str, float]](), list[str]()
        if not self.simulated:
            memory["peak_memory_mib"] = peak_memory_mib(self._device)
            warnings += [warning] if warning else []
            with optional(warnings, "measure", "kv_bytes_per_token"):
                memory["kv_bytes_per_token"], kv = kvcache.footprint(self.model, self.cfg.kv)
        if result is None:
            name = self.cfg.model.name
            warnings.append(f"model={name} has random weights: no perplexity is computed, it would mean nothing")
            return Scores(metrics=memory, kv=kv, warnings=warnings)
        self._nll = result.nll
        metrics = memory | {"nll": result.nll}
        if result.perplexity is None:
            warnings.append(f"perplexity exceeds the range of a float; its logarithm is nll={result.nll:.6g}")
        else:
            metrics["perplexity"] = result.perplexity
        return Scores(result.window_nll, metrics, kv, warnings)

    @torch.inference_mode()
    def load_baseline(self) -> None:
        """Load the float model.

        If nothing is timed, its hidden states are stored and `model` has the same tail, `model` is used instead.
        """
        if not self.times and self._same_dtype:
            tail = perplexity.scorer(self.model, self.windows).tail
            if self.is_baseline or self._shared().vouch_for(tail):
                self._baseline = self.model
                return
        self._baseline = self.source.load(self._baseline_dtype, self._device)

    def diverge(self) -> Diverged:
        """Measure divergence from the float model by the last hidden states of both.

        Raises: ValueError if the nll of this pass differs from that of `score`, or a divergence is not finite.
        """
        assert self._states is not None
        assert self._baseline is not None
        shared = self._shared()
        reference, scorer = (perplexity.scorer(model, self.windows) for model in (self._baseline, self.model))
        with self._spool() as float_states:
            if self.is_baseline:
                float_states = self._states
            else:
                shared.fill(float_states, partial(self._float_pass, float_states))
            refused = self._states.refused or float_states.refused
            if refused:
                return Diverged(warnings=[self._not_stored(refused)])
            if self._baseline is not self.model or self.is_baseline:
                with torch.inference_mode():
                    shared.publish(float_states, reference.tail)
            pair = (reference, float_states), (scorer, self._states)
            result = divergence.compare(*pair, self.windows, self.track, self.cfg.data.unscored)
        if not math.isclose(result.nll, self._nll, rel_tol=SAME_NLL):
            raise ValueError(f"nll={result.nll} of the divergence pass is not the perplexity pass's nll={self._nll}")
        return Diverged(result.window_kl, result.metrics)

    def time(self) -> Timing:
        """Measure latency, the memory of the KV cache, and joules if the machine has a readable energy counter."""
        assert self._baseline is not None
        cache, counter = kvcache.maker(self.cfg.kv), meter(self._device)
        pair = (self.model, self._baseline)
        timed = latency(pair, self.cfg.measure, self.cfg.seed, self.track, cache)
        joules, warnings = dict[str, float](), list(timed.warnings)
        if counter is not None:
            with optional(warnings, "measure", "energy"):
                joules = energy(pair, self.cfg.measure, self.cfg.seed, counter, cache)
        return Timing(timed.metrics | joules, counter.source if joules and counter else None, warnings)

    def _perplexity(self) -> perplexity.Perplexity:
        keep = None if self._states is None else self._states.append
        data, cache = self.cfg.data, kvcache.maker(self.cfg.kv)
        with one_line_errors(self.model, f"data.seq_len={data.seq_len}", "use a model.dtype that transformers runs"):
            return perplexity.perplexity(
                self.model, self.windows, data.batch_size, self.track, keep, cache, data.unscored
            )

    def _float_pass(self, float_states: Spool, keep: Callable[[Tensor], None]) -> None:
        """Pass the float model's states to `keep`.

        If the float model was not loaded, because its states were stored, they were deleted since: note that instead.
        """
        if self._baseline is self.model:
            float_states.refused = "the states of another run replaced the float model's"
        else:
            assert self._baseline is not None
            perplexity.perplexity(self._baseline, self.windows, self.cfg.data.batch_size, self.track, keep)

    def _not_stored(self, reason: str) -> str:
        return (
            f"measure.divergence_gib={self.cfg.measure.divergence_gib:g}: hidden states cannot be stored ({reason}), "
            "so no divergence is measured; free disk space, raise the limit or lower data.max_windows"
        )

    def _shared(self) -> FloatStates:
        """The float model's states for these windows, shared by all runs."""
        cache = DiskCache(cache_dir() / "float_states", self._limit)
        return FloatStates(cache, self._float_identity(), len(self.windows))

    def _float_identity(self) -> list[str]:
        """Everything that determines the float model's states, except the machine."""
        data = self.cfg.data
        names = [self.source.fingerprint, self.tokens_sha256, str(data.seq_len), _name(self._baseline_dtype)]
        code = sha256(Path(perplexity.__file__).read_bytes())
        return [*names, str(self._device), str(data.batch_size), code]

    def _spool(self) -> AbstractContextManager[Spool]:
        return spool(cache_dir() / "spool", self._limit)

    @property
    def _limit(self) -> int:
        """Bytes of disk that hidden states may take."""
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
