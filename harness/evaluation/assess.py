"""What a quantized model is worth: perplexity, divergence from the float model, memory and times, into the record."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.config.schema import RunConfig
from harness.data import windows as data
from harness.evaluation import divergence, energy, latency, perplexity
from harness.evaluation.hidden_states import FloatStates, Spool, spool
from harness.models import source as models
from harness.nn import kvcache
from harness.records import store
from harness.records.store import stage
from harness.utils.determinism import repeatable
from harness.utils.digests import sha256
from harness.utils.disk_cache import DiskCache, cache_dir
from harness.utils.progress import Track

_SAME_NLL = 1e-6  # relative; the divergence pass repeats the perplexity pass's own arithmetic


def assess(cfg: RunConfig, model: nn.Module, stream: data.Tokens, found: store.Record, track: Track) -> None:
    """Score, compare and time `model`, as far as `cfg` asks and the execution allows.

    Raises: ValueError if its logits are not finite.
    """
    device = next(model.parameters()).device
    timed = cfg.measure.latency and found.execution["mode"] != "simulated"
    with ExitStack() as stack:
        states = stack.enter_context(_spool(cfg)) if cfg.measure.divergence and cfg.model.scored else None
        with repeatable(device), stage(found, "evaluate"):
            _evaluate(cfg, model, stream.windows, found, track, states)
        if states is None and not timed:
            return
        with stage(found, "load", track):
            baseline = _baseline(cfg, model, stream, found, timed)
        if states is not None:
            with repeatable(device), stage(found, "divergence"):
                _diverge(cfg, (baseline, model), stream, states, found, track)
        if timed:
            with stage(found, "measure"):
                _measure(cfg, (model, baseline), found, track)


@torch.inference_mode()
def _baseline(cfg: RunConfig, model: nn.Module, stream: data.Tokens, found: store.Record, timed: bool) -> nn.Module:
    """The float model that others are compared with; `model` itself where its tail is as good, and nothing is timed."""
    alike = found.execution["dtype"] == found.execution["baseline_dtype"]
    tail = perplexity.scorer(model, stream.windows).tail
    if not timed and alike and (is_baseline(cfg, found) or _shared(cfg, stream, found).vouch_for(tail)):
        return model
    dtype = getattr(torch, found.execution["baseline_dtype"])
    return models.load(cfg.model, dtype, next(model.parameters()).device, cfg.seed)


def _evaluate(
    cfg: RunConfig, model: nn.Module, windows: Tensor, found: store.Record, track: Track, states: Spool | None
) -> None:
    """Perplexity, keeping the states that it follows from, and the peak of memory on the way.

    Of a model that is not scored, the peak of one prefill.
    A simulated run holds decoded floats: its memory says nothing of the format, and is not reported.
    """
    device = next(model.parameters()).device
    unsure = latency.reset_peak_memory(device)
    if cfg.model.scored:
        keep = None if states is None else states.append
        cache = kvcache.maker(cfg.kv)
        scored = perplexity.perplexity(model, windows, cfg.data.batch_size, track, keep, cache, cfg.data.unscored)
    else:
        latency.prefill(model, cfg.measure, cfg.seed, kvcache.maker(cfg.kv))
    if found.execution["mode"] != "simulated":
        found.metrics["peak_memory_mib"] = latency.peak_memory_mib(device)
        found.warnings += [unsure] if unsure else []
        slope, found.kv = kvcache.footprint(model, cfg.kv)
        found.metrics |= {} if slope is None else {"kv_bytes_per_token": slope}
    if not cfg.model.scored:
        found.warnings.append(f"model={cfg.model.name} has random weights: no perplexity is computed, it means nothing")
        return
    found.window_nll, found.metrics["nll"] = scored.window_nll, scored.nll
    if scored.perplexity is None:
        found.warnings.append(f"perplexity is beyond the range of a float; nll={scored.nll:.6g} says how far")
    else:
        found.metrics["perplexity"] = scored.perplexity


def _diverge(
    cfg: RunConfig,
    both: tuple[nn.Module, nn.Module],
    stream: data.Tokens,
    states: Spool,
    found: store.Record,
    track: Track,
) -> None:
    """Divergence from the float model, the first of `both`, by the last states of either.

    It is left out, with a warning, where states find no room.
    """
    shared = _shared(cfg, stream, found)
    scorers = [perplexity.scorer(model, stream.windows) for model in both]
    with _spool(cfg) as expected:
        if is_baseline(cfg, found):
            expected = states
        else:
            shared.fill(expected, partial(_float_pass, cfg, both, stream.windows, expected, track))
        refused = states.refused or expected.refused
        if refused:
            found.warnings.append(
                f"measure.divergence_gib={cfg.measure.divergence_gib:g} leaves no room for states ({refused}): "
                "no divergence is measured; free space, raise it or lower data.max_windows"
            )
            return
        if both[0] is not both[1] or is_baseline(cfg, found):
            with torch.inference_mode():
                shared.publish(expected, scorers[0].tail)
        pair = (scorers[0], expected), (scorers[1], states)
        diverged = divergence.compare(*pair, stream.windows, track, cfg.data.unscored)
    if not math.isclose(diverged.nll, found.metrics["nll"], rel_tol=_SAME_NLL):
        raise ValueError(f"the divergence pass gave nll={diverged.nll}, the perplexity pass {found.metrics['nll']}")
    found.window_kl = diverged.window_kl
    found.metrics |= diverged.metrics


def _measure(cfg: RunConfig, pair: latency.Pair, found: store.Record, track: Track) -> None:
    """Times, the cache's memory, and joules where the machine has a counter that may be read."""
    cache, meter = kvcache.maker(cfg.kv), energy.meter(next(pair[0].parameters()).device)
    found.metrics |= latency.latency(pair, cfg.measure, cfg.seed, track, cache)
    if meter is not None:
        found.metrics |= latency.energy(pair, cfg.measure, cfg.seed, meter, cache)
        found.execution["energy_source"] = meter.source


def _float_pass(
    cfg: RunConfig,
    both: tuple[nn.Module, nn.Module],
    windows: Tensor,
    expected: Spool,
    track: Track,
    keep: Callable[[Tensor], None],
) -> None:
    """Hand the float model's states to `keep`; where it is not there, as its states were a moment ago, say so."""
    if both[0] is both[1]:
        expected.refused = "another run has taken the place of the float model's states"
    else:
        perplexity.perplexity(both[0], windows, cfg.data.batch_size, track, keep)


def _shared(cfg: RunConfig, stream: data.Tokens, found: store.Record) -> FloatStates:
    """The float model's states of this stream, as all runs share them."""
    cache = DiskCache(cache_dir() / "float_states", int(cfg.measure.divergence_gib * 2**30))
    return FloatStates(cache, _float_identity(cfg, stream, found), len(stream.windows))


def _spool(cfg: RunConfig) -> AbstractContextManager[Spool]:
    return spool(cache_dir() / "spool", int(cfg.measure.divergence_gib * 2**30))


def _float_identity(cfg: RunConfig, stream: data.Tokens, found: store.Record) -> list[str]:
    """What the float model's states follow from, beside the machine."""
    source = [sha256(Path(perplexity.__file__).read_bytes())]
    run_on = [found.execution["baseline_dtype"], found.execution["device"], str(cfg.data.batch_size)]
    return [str(found.model["fingerprint"]), str(stream.info["tokens_sha256"]), str(cfg.data.seq_len), *run_on, *source]


def is_baseline(cfg: RunConfig, found: store.Record) -> bool:
    """Whether a run is of the float model that others are compared with."""
    return not cfg.steps and cfg.kv is None and found.execution["dtype"] == found.execution["baseline_dtype"]
