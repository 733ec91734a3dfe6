"""The stages of a run, in order; their results are added to the record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import data, quantization
from harness.config import RunConfig
from harness.evaluation import Assessment, optional, peak_memory_mib, reset_peak_memory, warn_of_lookahead
from harness.models import Decoder, QuantizedSource, Source
from harness.models.exchange.labels import summary
from harness.nn import kvcache, resident_bytes, stored_bytes
from harness.quantization import mixed
from harness.records.record import Execution, Record, Text, Texts, Weights
from harness.runs import save
from harness.runs.analysis import Analyser
from harness.runs.checks import check, device_of
from harness.utils.determinism import repeatable
from harness.utils.disk_cache import DiskCache, cache_dir
from harness.utils.progress import Track, silent


def run(cfg: RunConfig, source: Source, record: Record, track: Track = silent) -> None:
    """Execute one run. Each stage adds its results to `record`, so that a failed run has those of finished stages.

    Raises: ValueError, in one line, if the configuration, the text or the weights do not allow the run.
    """
    if cfg.save is not None:
        save.check(cfg, source, Path(cfg.save))
    with stage(record, "load", track):  # the first run converts the embedded model here
        cfg = _with_kv_of(source, cfg, record)
        record.warnings += check(cfg, source)
    device = device_of(cfg.device)
    dtype, baseline = source.dtype(cfg.model.dtype), source.reference.dtype(cfg.model.baseline_dtype)
    record.execution = _execution(cfg, device, dtype, baseline)
    with stage(record, "data", track):
        stream, calibration = _tokens(cfg, source, record)
    with stage(record, "load", track):
        model = source.load(dtype, device, record.warnings.append)
        record.model = Weights(**source.provenance(model))
        record.warnings += warn_of_lookahead(model, source.name) if cfg.model.scored else []
    if cfg.kv is not None:
        kvcache.prove(model, cfg.kv)
    if isinstance(source, QuantizedSource):
        _adopt(cfg, source, Decoder(model), record, track)
        if source.base is None:  # then there is nothing that it could diverge from
            cfg = replace(cfg, measure=replace(cfg.measure, divergence=False))
    else:
        with repeatable(device):
            _quantize(cfg, source, Decoder(model), stream[:1] if calibration is None else calibration, record, track)
    _assess(cfg, source.reference, model, stream, record, track)


@contextmanager
def stage(record: Record, name: str, track: Track = silent) -> Iterator[None]:
    """Add the seconds of a stage to the record.

    `track` is passed for stages that do not show their own progress: it shows that they are running.
    """
    progress = track([name], name, 1)
    start = time.perf_counter()
    try:
        next(progress)
        yield
    finally:
        record.stages[name] = record.stages.get(name, 0.0) + time.perf_counter() - start
        progress.close()


def _with_kv_of(source: Source, cfg: RunConfig, record: Record) -> RunConfig:
    """The configuration with the KV cache that a checkpoint prescribes, unless it names another."""
    kv = source.kv if isinstance(source, QuantizedSource) and cfg.kv is None else None
    if kv is None:
        return cfg
    if cfg.measure.runtime == "compiled":
        record.warnings.append("the checkpoint's scales of the KV cache are not applied with measure.runtime=compiled")
        return cfg
    return replace(cfg, kv=kv)


def _tokens(cfg: RunConfig, source: Source, record: Record) -> tuple[Tensor, Tensor | None]:
    """The evaluation windows, and the calibration sequences if the run reads any, checked not to overlap with them."""
    stream = data.evaluation(cfg.data, source.tokenizer)
    record.data = Texts(protocol=cfg.data.protocol_id, evaluation=Text(**stream.info))
    record.warnings += stream.warnings
    source.check_tokens(stream.windows, f"data.path={stream.info['source']}")
    if not cfg.calibrates:
        return stream.windows, None
    calibration = data.calibration(cfg.data, source.tokenizer, cfg.seed)
    record.data = replace(record.data, calibration=Text(**calibration.info))
    record.warnings += calibration.warnings
    source.check_tokens(calibration.windows, f"data.calibration_path={calibration.info['source']}")
    warning = data.check_overlap(cfg.data, calibration, stream)
    record.warnings += [warning] if warning else []
    return stream.windows, calibration.windows


def _quantize(cfg: RunConfig, source: Source, decoder: Decoder, tokens: Tensor, record: Record, track: Track) -> None:
    """Choose the width of each linear, quantize, save and analyse; optional parts only if the configuration says so."""
    device = next(decoder.model.parameters()).device
    uncertain = reset_peak_memory(device)
    cache = DiskCache(cache_dir() / "statistics", int(cfg.engine.cache_gib * 2**30))
    widths = dict[str, int]()
    if cfg.mixes:
        with stage(record, "allocate"):
            plan = mixed.plan(decoder, cfg, mixed.source(cfg, source.fingerprint), tokens, cache, track)
        widths, record.analysis = plan.bits, replace(record.analysis, mixed=plan.summary)
        record.warnings += plan.warnings
    if cfg.analyses:
        with stage(record, "analyse"):
            analyser = Analyser(decoder, cfg, tokens, cache, track)
    with stage(record, "quantize"):
        result = quantization.quantize(decoder, cfg, tokens, track, cache, widths)
    if cfg.save is not None and cfg.scheme is not None:
        record.unsaved = save.save(cfg, source, decoder.model, result)
    if cfg.steps and not uncertain and not cfg.analyses:
        record.metrics["quantize_peak_mib"] = peak_memory_mib(device)
    if cfg.analyses:
        with optional(record.warnings, "analyse", "sensitivity and outliers"), stage(record, "analyse"):
            record.analysis = replace(analyser.analyse(result), mixed=record.analysis.mixed)
    # After the analysis, which compares linears of the blocks alone.
    head = _finish_head(cfg, decoder.model, result, record)
    _add_format(cfg, record, decoder.model, result)
    record.layers += head


def _adopt(cfg: RunConfig, source: QuantizedSource, decoder: Decoder, record: Record, track: Track) -> None:
    """Put the linears of a checkpoint into the model that was loaded from it."""
    with stage(record, "load"):
        result = quantization.adopt(decoder, source, cfg, track)
    head = _finish_head(cfg, decoder.model, result, record)
    _add_format(cfg, record, decoder.model, result)
    record.layers += head
    formats = [row for row in result.layers if "format" in row]
    label = f"{source.format}: {summary(row['format'] for row in formats)}"
    bits = Counter(row.pop("bits") for row in formats).most_common(1)
    record.model = replace(record.model, format=label, bits=bits[0][0] if bits else None)


def _finish_head(cfg: RunConfig, model: nn.Module, result: quantization.Result, record: Record) -> list[dict[str, Any]]:
    """Quantize the head if the run says so, else let a native kernel run it beside packed linears.

    Returns: its row of the record, if it is quantized.
    """
    if cfg.head is not None:
        with stage(record, "quantize"):
            row, kernel = quantization.quantize_head(model, cfg.head, cfg.execution, result.warnings)
        result.kernels |= {kernel} if kernel else set()
        return [row]
    if result.kernels:
        record.execution = replace(record.execution, head=quantization.pack_head(model))
    return []


def _add_format(cfg: RunConfig, record: Record, model: nn.Module, result: quantization.Result) -> None:
    """Add the properties of the quantized model that are known without a measurement: layers, sizes, kernels.

    `quantize_s` is absent in a run with an analysis, because an analysis observes more than the method needs.
    """
    record.layers = result.layers
    record.warnings += result.warnings
    record.metrics["bits_per_weight"] = result.bits_per_weight
    if cfg.steps:
        record.metrics["quantized_share"] = result.quantized_share
    if result.total_weight_error is not None:
        record.metrics["total_weight_error"] = result.total_weight_error
    if result.distilled is not None:
        record.metrics |= {"held_out_kl": result.distilled.after, "held_out_kl_before": result.distilled.before}
    if result.rotated is not None:
        record.metrics |= {"rotation_kl": result.rotated.after, "rotation_kl_before": result.rotated.before}
    record.metrics["model_size_mib"] = stored_bytes(model, result.decoded) / 2**20
    if record.execution.mode != "simulated":
        record.metrics["resident_mib"] = resident_bytes(model) / 2**20
    if result.kernels:
        kernel, joined = ", ".join(sorted(result.kernels)), result.joined or None
        record.execution = replace(record.execution, kernel=kernel, joined=joined)
    if cfg.mixes:
        record.warnings += mixed.over_budget(cfg, result.layers)
    if cfg.steps and not cfg.analyses and not cfg.adopts:
        record.metrics["quantize_s"] = record.stages["quantize"]


def _assess(cfg: RunConfig, source: Source, model: nn.Module, windows: Tensor, record: Record, track: Track) -> None:
    """Score the model, compare it with the float model, and time it; optional parts only if the run has them.

    An error outside the pass over the windows becomes a warning: the record keeps what was measured.
    """
    assert record.data.evaluation is not None
    tokens_sha256, device = str(record.data.evaluation.tokens_sha256), next(model.parameters()).device
    simulated = record.execution.mode == "simulated"
    with Assessment(cfg, source, model, windows, tokens_sha256, simulated, track) as assessment:
        with repeatable(device), stage(record, "evaluate"):
            scores = assessment.score()
        record.kv = scores.kv
        record.metrics |= scores.metrics
        record.warnings += scores.warnings
        loaded = not assessment.needs_baseline
        if assessment.needs_baseline:
            with optional(record.warnings, "baseline", "divergence and latency"), stage(record, "load", track):
                assessment.load_baseline()
                loaded = True
        if loaded and assessment.diverges:
            _diverge(assessment, record, device)
        if cfg.model.scored:
            with repeatable(device), stage(record, "evaluate"):
                scores = assessment.scores()
            record.window_nll = scores.window_nll
            record.metrics |= scores.metrics
            record.warnings += scores.warnings
        if loaded and assessment.times:
            _time(assessment, record)


def _diverge(assessment: Assessment, record: Record, device: torch.device) -> None:
    """Add the divergence from the float model."""
    with optional(record.warnings, "divergence", "kl"), repeatable(device), stage(record, "divergence"):
        diverged = assessment.diverge()
        record.window_kl = diverged.window_kl
        record.metrics |= diverged.metrics
        record.warnings += diverged.warnings


def _time(assessment: Assessment, record: Record) -> None:
    """Add latency and energy."""
    with optional(record.warnings, "measure", "latency"), stage(record, "measure"):
        timing = assessment.time()
        record.metrics |= timing.metrics
        record.warnings += timing.warnings
        record.execution = replace(record.execution, energy_source=timing.energy_source)


def _execution(cfg: RunConfig, device: torch.device, dtype: torch.dtype, baseline: torch.dtype) -> Execution:
    return Execution(
        mode=cfg.execution if cfg.quantizes else "float",
        device=str(device),
        kv=cfg.kv.label if cfg.kv else None,
        dtype=str(dtype).removeprefix("torch."),
        baseline_dtype=str(baseline).removeprefix("torch."),
    )
