"""The assessment of a quantized model: perplexity, divergence from the float model, memory, latency and energy."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from harness.calibration import SAME_NLL
from harness.config import RunConfig
from harness.evaluation import compiled, divergence, perplexity
from harness.evaluation.energy import energy, meter
from harness.evaluation.hidden_states import Spool
from harness.evaluation.latency import latency, prefill
from harness.evaluation.memory import peak_memory_mib, reset_peak_memory
from harness.evaluation.missing import optional
from harness.evaluation.shared import Shared
from harness.evaluation.stages import Diverged, Scores, Timing
from harness.evaluation.workload import Eager, Pair, random_tokens
from harness.models import Source
from harness.nn import kvcache, one_line_errors
from harness.utils.progress import Track


@dataclass
class Assessment:
    """The stages after quantization, for one model; a context manager that deletes the hidden states on exit.

    windows, tokens_sha256  the evaluation tokens (W, T) and their hash
    simulated               whether the model runs on decoded floats: then its memory and latency are not the format's

    Call `score` first, then `load_baseline` if `needs_baseline`, then `diverge`, `scores` and `time`.
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
        self._shared = Shared(self.cfg, self.source, self.windows, self.tokens_sha256, self._device)
        self._states: Spool | None = None
        self._baseline: nn.Module | None = None
        self._scorer: perplexity.Scorer
        self._window_nll: list[float | None] = []

    def __enter__(self) -> Assessment:
        if self.diverges:
            self._states = self._stack.enter_context(self._shared.spool())
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
        return not self.cfg.quantizes and self.cfg.kv is None and self._same_dtype

    def score(self) -> Scores:
        """Run the model on all windows, store the last hidden states for `diverge`, and measure the peak memory.

        Windows with stored states are scored by `diverge`, which computes their logits anyway; the first window is also
        scored here, so the peak includes the head and a slice of logits. `scores` returns the result.
        Raises: ValueError if the logits of a window that is scored here are not finite.
        """
        warning = reset_peak_memory(self._device)
        if self.cfg.model.scored:
            self._run_windows()
        else:
            prefill(self.model, self.cfg.measure, self.cfg.seed, kvcache.maker(self.cfg.kv))
        memory, kv, warnings = dict[str, float](), list[dict[str, float]](), list[str]()
        if not self.simulated:
            memory["peak_memory_mib"] = peak_memory_mib(self._device)
            warnings += [warning] if warning else []
            with optional(warnings, "measure", "kv_bytes_per_token"):
                memory["kv_bytes_per_token"], kv = kvcache.footprint(self.model, self.cfg.kv)
        if not self.cfg.model.scored:
            name = self.cfg.model.name
            warnings.append(f"model={name} has random weights: no perplexity is computed, it would mean nothing")
        return Scores(metrics=memory, kv=kv, warnings=warnings)

    def scores(self) -> Scores:
        """The perplexity; windows that neither `score` nor `diverge` have scored are scored now, from their states.

        Raises: ValueError if the model's logits are not finite.
        """
        for i, nll in enumerate(self._window_nll):
            if nll is None:
                assert self._states is not None
                states, tokens = self._states[i].to(self._device), self.windows[i].to(self._device)
                with self._forwards():
                    self._window_nll[i] = perplexity.mean_nll(self._scorer, states, tokens, self.cfg.data.unscored)
        window_nll = [nll for nll in self._window_nll if nll is not None]
        perplexity.check_finite(window_nll)
        result = perplexity.Perplexity(window_nll)
        if result.perplexity is None:
            warning = f"perplexity exceeds the range of a float; its logarithm is nll={result.nll:.6g}"
            return Scores(window_nll, {"nll": result.nll}, warnings=[warning])
        return Scores(window_nll, {"nll": result.nll, "perplexity": result.perplexity})

    @torch.inference_mode()
    def load_baseline(self) -> None:
        """Load the float model.

        If nothing is timed, its hidden states are stored and `model` has the same tail, `model` is used instead.
        """
        untimed = not self.times and self._same_dtype
        if self.is_baseline or (untimed and self._shared.states.vouch_for(self._scorer.tail)):
            self._baseline = self.model
        else:
            self._baseline = self.source.load(self._shared.dtype, self._device)

    def diverge(self) -> Diverged:
        """Measure divergence from the float model by the last hidden states of both, and score the model's windows.

        Raises: ValueError if the nll of the first window differs from that of `score`, or a divergence is not finite.
        """
        assert self._states is not None
        assert self._baseline is not None
        if self.is_baseline:
            return self._publish_own()
        shared = self._shared.states
        same = self._baseline is self.model
        reference = self._scorer if same else perplexity.scorer(self._baseline, self.windows)
        with self._shared.spool() as float_states:
            shared.fill(float_states, partial(self._float_pass, float_states, reference))
            refused = self._states.refused or float_states.refused
            if refused:
                return Diverged(warnings=[self._not_stored(refused)])
            if not same:
                with torch.inference_mode():
                    shared.publish(float_states, reference.tail)
            pair = (reference, float_states), (self._scorer, self._states)
            head = self._shared.head(reference, float_states[0].to(self._device))
            result = divergence.compare(*pair, self.windows, self.track, self.cfg.data.unscored, head)
        expected = self._window_nll[0]
        if expected is None or not math.isclose(result.window_nll[0], expected, rel_tol=SAME_NLL):
            raise ValueError(f"nll={result.window_nll[0]} of window 0 is not the nll={expected} of the model alone")
        self._window_nll = [a if a is not None else b for a, b in zip(self._window_nll, result.window_nll, strict=True)]
        return Diverged(result.window_kl, result.metrics)

    def time(self) -> Timing:
        """Measure latency, the memory of the KV cache, and joules if the machine has a readable energy counter."""
        pair, counter = self._workloads(), meter(self._device)
        timed = latency(pair, self.cfg.measure, self.track)
        joules, warnings = dict[str, float](), list(timed.warnings)
        if counter is not None:
            with optional(warnings, "measure", "energy"):
                joules = energy(pair, counter)
        return Timing(timed.metrics | joules, counter.source if joules and counter else None, warnings)

    def _workloads(self) -> Pair:
        """The timed calls of the model and of its baseline, in the runtime of the configuration."""
        assert self._baseline is not None
        prompt, decoded = random_tokens(self.model, self.cfg.measure, self.cfg.seed)
        if self.cfg.measure.runtime == "compiled":
            return compiled.prepare((self.model, self._baseline), prompt, decoded)
        cache = kvcache.maker(self.cfg.kv)
        return Eager(self.model, prompt, decoded, cache), Eager(self._baseline, prompt, decoded)

    def _run_windows(self) -> None:
        """Run the model on all windows; score the first, and those whose states `diverge` cannot use."""
        data = self.cfg.data
        with self._forwards():
            self._scorer = perplexity.scorer(self.model, self.windows, kvcache.maker(self.cfg.kv))
            for states, tokens in perplexity.last_states(self._scorer, self.windows, data.batch_size, self.track):
                stored = self._states is not None and self._states.append(states)
                later = stored and self._window_nll and not self.is_baseline
                nll = None if later else perplexity.mean_nll(self._scorer, states, tokens, data.unscored)
                perplexity.check_finite([0.0 if nll is None else nll], len(self._window_nll))
                self._window_nll.append(nll)

    def _forwards(self) -> AbstractContextManager[None]:
        """Turns an error in the model's forward into one line."""
        setting = f"data.seq_len={self.cfg.data.seq_len}"
        return one_line_errors(self.model, setting, "use a model.dtype that transformers runs")

    def _publish_own(self) -> Diverged:
        """Store the states of the model, which is the float model, for other runs; it does not diverge from itself."""
        assert self._states is not None
        if self._states.refused:
            return Diverged(warnings=[self._not_stored(self._states.refused)])
        with torch.inference_mode():
            self._shared.states.publish(self._states, self._scorer.tail)
        result = divergence.of_itself(self.windows, self.cfg.data.unscored)
        return Diverged(result.window_kl, result.metrics)

    def _float_pass(self, float_states: Spool, reference: perplexity.Scorer, keep: Callable[[Tensor], object]) -> None:
        """Pass the float model's states to `keep`.

        If the float model was not loaded, because its states were stored, they were deleted since: note that instead.
        """
        if self._baseline is self.model:
            float_states.refused = "the states of another run replaced the float model's"
            return
        for states, _ in perplexity.last_states(reference, self.windows, self.cfg.data.batch_size, self.track):
            keep(states)

    def _not_stored(self, reason: str) -> str:
        return (
            f"measure.divergence_gib={self.cfg.measure.divergence_gib:g}: hidden states cannot be stored ({reason}), "
            "so no divergence is measured; free disk space, raise the limit or lower data.max_windows"
        )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _same_dtype(self) -> bool:
        return self.source.dtype(self.cfg.model.dtype) == self._shared.dtype
