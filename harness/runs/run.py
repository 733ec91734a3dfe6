"""One run: from a configuration, through the stages of the data flow, to its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.schema import RunConfig
from harness.data import windows
from harness.evaluation import latency
from harness.evaluation.assess import assess
from harness.models import source
from harness.models.exchange import native
from harness.nn import kvcache, linear
from harness.quantization import engine, mixed
from harness.records import store
from harness.records.store import stage
from harness.runs import analysis
from harness.utils.determinism import repeatable
from harness.utils.disk_cache import DiskCache, cache_dir
from harness.utils.progress import Track, silent

Json = dict[str, Any]


def run(cfg: RunConfig, found: store.Record, track: Track = silent) -> None:
    """Carry out one run, filling `found` stage by stage, so that a failure keeps what was reached.

    Raises: ValueError for whatever the configuration, the text or the weights do not allow.
    """
    if cfg.save is not None:
        native.check(Path(cfg.save))
    with stage(found, "load", track):  # the first time, this converts the embedded model
        shape = source.config(cfg.model)
        _check(cfg, shape, found)
    device = device_of(cfg.device)
    dtype = source.resolve_dtype(cfg.model.dtype, shape)
    baseline_dtype = source.resolve_dtype(cfg.model.baseline_dtype, shape)
    found.execution = _execution(cfg, device, dtype, baseline_dtype)

    with stage(found, "data", track):
        stream, calibration = _tokens(cfg, found)
    with stage(found, "load", track):
        model = source.load(cfg.model, dtype, device, cfg.seed)
        found.model = source.provenance(cfg.model, model, cfg.seed)
    if cfg.kv is not None:
        kvcache.prove(model, cfg.kv)
    with repeatable(device):
        _quantize(cfg, model, stream.windows[:1] if calibration is None else calibration, found, track)
    assess(cfg, model, stream, found, track)


def _quantize(cfg: RunConfig, model: nn.Module, tokens: Tensor, found: store.Record, track: Track) -> None:
    """Choose widths where they are to be chosen, quantize, save, and analyse, as far as each is asked for."""
    device = next(model.parameters()).device
    unsure = latency.reset_peak_memory(device)
    cache = DiskCache(cache_dir() / "statistics", int(cfg.engine.cache_gib * 2**30))
    widths = _widths(cfg, model, tokens, cache, found, track) if cfg.mixes else {}
    if cfg.analyses:
        with stage(found, "analyse"):
            asked = analysis.Analysis(model, cfg, tokens, cache, track)
    with stage(found, "quantize"):
        result = engine.quantize(model, cfg, tokens, track, cache, widths)
    _note_format(cfg, found, model, result)
    if cfg.save is not None and cfg.scheme is not None:
        native.save(model, result.weights, cfg.scheme, found.model, Path(cfg.save))
        result.weights.clear()
    if cfg.steps and not unsure and not cfg.analyses:
        found.metrics["quantize_peak_mib"] = latency.peak_memory_mib(device)
    if cfg.analyses:
        with stage(found, "analyse"):
            found.analysis |= asked.of(result)


def _tokens(cfg: RunConfig, found: store.Record) -> tuple[windows.Tokens, Tensor | None]:
    """The evaluation stream and, where something needs it, calibration data proved apart from it."""
    encode = source.tokenizer(cfg.model)
    stream = windows.evaluation(cfg.data, encode)
    found.data = {"protocol": cfg.data.protocol_id, "evaluation": stream.info}
    if not cfg.calibrates:
        return stream, None
    calibration = windows.calibration(cfg.data, encode, cfg.seed)
    found.data["calibration"] = calibration.info
    warning = windows.check_overlap(cfg.data, calibration, stream)
    found.warnings += [warning] if warning else []
    return stream, calibration.windows


def _check(cfg: RunConfig, shape: Any, found: store.Record) -> None:
    """What a configuration cannot be, as far as the model's shape tells before its weights are there."""
    found.warnings += cfg.warnings
    _check_lengths(cfg, shape)
    engine.check(source.skeleton(shape), cfg)
    if cfg.kv is not None:
        warning = kvcache.check(cfg.kv, shape, cfg.data.seq_len, cfg.model.name)
        found.warnings += [warning] if warning else []


def _check_lengths(cfg: RunConfig, shape: Any) -> None:
    longest = getattr(shape.get_text_config(), "max_position_embeddings", None)
    timed = cfg.measure.prompt_len + cfg.measure.warmup + cfg.measure.decode_tokens
    wanted = {"data.seq_len": cfg.data.seq_len}
    if cfg.calibrates:
        wanted["data.calibration_seq_len"] = cfg.data.calibration_seq_len
    if cfg.measure.latency:
        wanted["measure.prompt_len + warmup + decode_tokens"] = timed
    for key, length in wanted.items():
        if longest is not None and length > longest:
            raise ValueError(
                f"{key}={length} exceeds the {longest} positions of model={cfg.model.name}; use {longest} or less"
            )


def _widths(
    cfg: RunConfig, model: nn.Module, tokens: Tensor, cache: DiskCache, found: store.Record, track: Track
) -> dict[str, int]:
    """The bits of each linear, as `mixed` chooses them."""
    with stage(found, "allocate"):
        plan = mixed.plan(model, cfg, tokens, cache, track)
    found.warnings += plan.warnings
    found.analysis["mixed"] = plan.summary
    return plan.bits


def _note_format(cfg: RunConfig, found: store.Record, model: nn.Module, result: engine.Result) -> None:
    """What the quantized model is, before anything is asked of it.

    An analysis observes more than the method asks for, so that its time is none of the method's.
    """
    found.layers = result.layers
    found.warnings += result.warnings
    found.metrics["bits_per_weight"] = result.bits_per_weight
    found.metrics["model_size_mib"] = linear.stored_bytes(model) / 2**20
    if found.execution["mode"] != "simulated":
        found.metrics["resident_mib"] = linear.resident_bytes(model) / 2**20
    if result.kernels:
        found.execution["kernel"] = ", ".join(sorted(result.kernels))
    if cfg.mixes:
        found.warnings += mixed.over_budget(cfg, result.layers)
    if cfg.steps and not cfg.analyses:
        found.metrics["quantize_s"] = found.stages["quantize"]


def _execution(cfg: RunConfig, device: torch.device, dtype: torch.dtype, baseline: torch.dtype) -> Json:
    mode = cfg.execution if cfg.steps else "float"
    what = {"mode": mode, "device": str(device)} | ({"kv": cfg.kv.label} if cfg.kv else {})
    floats = {"dtype": str(dtype), "baseline_dtype": str(baseline)}
    return what | {key: name.removeprefix("torch.") for key, name in floats.items()}


def device_of(wanted: str) -> torch.device:
    """The device that the key `device` means.

    Raises: ValueError, in one line, if it is unknown or not available.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device={wanted} is unknown; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={wanted} is not supported; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={wanted} is not available: torch {torch.__version__} sees no GPU; use device=cpu")
    return device
