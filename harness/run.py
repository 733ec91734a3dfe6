"""One run: from a configuration, through the stages of the data flow, to its record."""

from __future__ import annotations

import gc
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import analysis, checkpoint, data, engine, kvcache, linear, measure, mixed, models, record, text
from harness.assess import assess
from harness.config import AROUND, RunConfig, build_run, changed_options, source_files
from harness.determinism import repeatable
from harness.embedded import cache_dir
from harness.errors import one_line
from harness.kernels import table
from harness.progress import Track, silent
from harness.record import stage
from harness.statcache import StatCache

Json = dict[str, Any]

_HERE = Path(__file__).parent
_ARITHMETIC = (
    "allocation.py",
    "analysis.py",
    "architecture.py",
    "assess.py",
    "data.py",
    "divergence.py",
    "engine.py",
    "evaluate.py",
    "finetune.py",
    "flow.py",
    "install.py",
    "kvcache.py",
    "linear.py",
    "measure.py",
    "mixed.py",
    "observe.py",
    "outliers.py",
    "producers.py",
    "residual.py",
    "sensitivity.py",
    "shortcut.py",
    "stream.py",
    "survey.py",
    "tail.py",
    "text.py",
    "trial.py",
)
_SOURCES = (*sorted((_HERE / "core").glob("*.py")), *(_HERE / name for name in _ARITHMETIC))


def run(cfg: RunConfig, found: record.Record, track: Track = silent) -> None:
    """Carry out one run, filling `found` stage by stage, so that a failure keeps what was reached.

    Raises: ValueError for whatever the configuration, the text or the weights do not allow.
    """
    if cfg.save is not None:
        checkpoint.check(Path(cfg.save))
    with stage(found, "load", track):  # the first time, this converts the embedded model
        shape = models.config(cfg.model)
        _check(cfg, shape, found)
    device = _device(cfg.device)
    dtype = models.resolve_dtype(cfg.model.dtype, shape)
    baseline_dtype = models.resolve_dtype(cfg.model.baseline_dtype, shape)
    found.execution = _execution(cfg, device, dtype, baseline_dtype)

    with stage(found, "data", track):
        stream, calibration = _tokens(cfg, found)
    with stage(found, "load", track):
        model = models.load(cfg.model, dtype, device, cfg.seed)
        found.model = models.provenance(cfg.model, model, cfg.seed)
    if cfg.kv is not None:
        kvcache.prove(model, cfg.kv)
    with repeatable(device):
        _quantize(cfg, model, stream.windows[:1] if calibration is None else calibration, found, track)
    assess(cfg, model, stream, found, track)


def _quantize(cfg: RunConfig, model: nn.Module, tokens: Tensor, found: record.Record, track: Track) -> None:
    """Choose widths where they are to be chosen, quantize, save, and analyse, as far as each is asked for."""
    device = next(model.parameters()).device
    unsure = measure.reset_peak_memory(device)
    cache = StatCache(cache_dir() / "statistics", int(cfg.engine.cache_gib * 2**30))
    widths = _widths(cfg, model, tokens, cache, found, track) if cfg.mixes else {}
    if cfg.analyses:
        with stage(found, "analyse"):
            asked = analysis.Analysis(model, cfg, tokens, cache, track)
    with stage(found, "quantize"):
        result = engine.quantize(model, cfg, tokens, track, cache, widths)
    _note_format(cfg, found, model, result)
    if cfg.save is not None and cfg.scheme is not None:
        checkpoint.save(model, result.weights, cfg.scheme, found.model, Path(cfg.save))
        result.weights.clear()
    if cfg.steps and not unsure and not cfg.analyses:
        found.metrics["quantize_peak_mib"] = measure.peak_memory_mib(device)
    if cfg.analyses:
        with stage(found, "analyse"):
            found.analysis |= asked.of(result)


def execute(raw: Json, track: Track = silent, show_traceback: bool = False) -> tuple[record.Record, bool]:
    """Run what `raw`, the resolved configuration, says, unless its record is there already.

    Returns: the record, failed ones included, and whether it was there already.
    """
    found = record.Record(run_id=_early(raw), config=raw)
    try:
        folder = record.usable(raw.get("results_dir"))
    except ValueError as error:
        found.status, found.error = "failed", one_line(error)
        return found, False
    try:
        cfg = build_run(raw)
        found.run_id, found.options = run_id(cfg, raw), changed_options(cfg)
        done = None if cfg.force or cfg.save else record.finished(folder, found.run_id)
        if done is not None:
            return done, True
        found.environment = record.environment()
        torch.manual_seed(cfg.seed)
        run(cfg, found, track)
    except Exception as error:  # a sweep goes on: whatever went wrong is this run's result
        found.status, found.error = "failed", one_line(error)
        if show_traceback:
            traceback.print_exc()
    finally:
        gc.collect()
    _keep(found, folder)
    return found, False


def failed(raw: Json, error: str) -> record.Record:
    """Leave the record of a run that could not tell its end itself."""
    found = record.Record(_early(raw), "failed", error, raw, environment=record.environment())
    with suppress(ValueError):  # without a folder there is the line on the screen alone
        _keep(found, record.usable(raw.get("results_dir")))
    return found


def _early(raw: Json) -> str:
    """Stands for a run that fails before all that decides it is known."""
    return record.run_id(_neutral(raw))


def _keep(found: record.Record, folder: Path) -> None:
    """Write a record, elsewhere if its folder has no room; an early failure of the same run is forgotten."""
    try:
        record.write(found, folder)
        if found.status == "ok":
            record.path_of(folder, _early(found.config)).unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a full disk; a figure that JSON cannot hold
        place = record.rescue(found)
        saved = f"it is kept as {place}, move it there" if place else "it is lost"
        found.status = "failed"
        found.error = (
            f"results_dir={folder}: the record cannot be written ({error}); {saved}, free space or name another folder"
        )


def run_id(cfg: RunConfig, raw: Json) -> str:
    """Hash of what decides the result: configuration, weights, text, and the source of method and arithmetic.

    Left out is what does not: `bits` beside the scheme's own, folders, and for the float baseline all that
    only quantization reads.
    """
    decides = _neutral(raw)
    decides["data"] = {key: value for key, value in raw["data"].items() if key not in ("path", "calibration_path")}
    decides["evaluation_text"] = text.identity(cfg.data, "evaluation")
    decides["model"] = asdict(cfg.model) | {"path": None, "fingerprint": models.fingerprint(cfg.model, cfg.seed)}
    decides["engine"] = {key: value for key, value in raw["engine"].items() if key != "cache_gib"}
    decides["device"] = str(_device(cfg.device))
    decides["measure"] = {key: value for key, value in raw["measure"].items() if key != "divergence_gib"}
    if engine.needs_calibration(cfg):
        decides["calibration_text"] = text.identity(cfg.data, "calibration")
    else:
        for key in ("calibration_source", "num_samples", "calibration_seq_len", "sampling", "allow_overlap"):
            decides["data"].pop(key, None)
        del decides["engine"]
    for key, asked in (("analysis", cfg.analyses), ("mixed", cfg.mixes), ("kv", cfg.kv)):
        if not asked:
            decides.pop(key, None)  # nor are they in records of before
    if cfg.mixes:
        decides["mixed"] = mixed.identity(cfg)
        decides["scheme"] = raw["scheme"] | {"weight": raw["scheme"]["weight"] | {"bits": None}}
    for key in ("skip", "scheme", "execution") if not cfg.steps else ():
        del decides[key]
    kernels = {_HERE / "kernels" / f"{name}.py" for name in table.MODULES[_device(cfg.device).type]}
    files = kernels.union(_SOURCES, *map(source_files, cfg.steps.values()))
    decides["source"] = sorted(text.sha256(file.read_bytes()) for file in files)
    return record.run_id(decides)


def _tokens(cfg: RunConfig, found: record.Record) -> tuple[data.Tokens, Tensor | None]:
    """The evaluation stream and, where something needs it, calibration data proved apart from it."""
    encode = models.tokenizer(cfg.model)
    stream = data.evaluation(cfg.data, encode)
    found.data = {"protocol": cfg.data.protocol_id, "evaluation": stream.info}
    if not engine.needs_calibration(cfg):
        return stream, None
    calibration = data.calibration(cfg.data, encode, cfg.seed)
    found.data["calibration"] = calibration.info
    warning = data.check_overlap(cfg.data, calibration, stream)
    found.warnings += [warning] if warning else []
    return stream, calibration.windows


def _check(cfg: RunConfig, shape: Any, found: record.Record) -> None:
    """What a configuration cannot be, as far as the model's shape tells before its weights are there."""
    found.warnings += cfg.warnings
    _check_lengths(cfg, shape)
    engine.check(models.skeleton(shape), cfg)
    if cfg.kv is not None:
        warning = kvcache.check(cfg.kv, shape, cfg.data.seq_len, cfg.model.name)
        found.warnings += [warning] if warning else []


def _check_lengths(cfg: RunConfig, shape: Any) -> None:
    longest = getattr(shape.get_text_config(), "max_position_embeddings", None)
    timed = cfg.measure.prompt_len + cfg.measure.warmup + cfg.measure.decode_tokens
    wanted = {"data.seq_len": cfg.data.seq_len}
    if engine.needs_calibration(cfg):
        wanted["data.calibration_seq_len"] = cfg.data.calibration_seq_len
    if cfg.measure.latency:
        wanted["measure.prompt_len + warmup + decode_tokens"] = timed
    for key, length in wanted.items():
        if longest is not None and length > longest:
            raise ValueError(
                f"{key}={length} exceeds the {longest} positions of model={cfg.model.name}; use {longest} or less"
            )


def _widths(
    cfg: RunConfig, model: nn.Module, tokens: Tensor, cache: StatCache, found: record.Record, track: Track
) -> dict[str, int]:
    """The bits of each linear, as `mixed` chooses them."""
    with stage(found, "allocate"):
        plan = mixed.plan(model, cfg, tokens, cache, track)
    found.warnings += plan.warnings
    found.analysis["mixed"] = plan.summary
    return plan.bits


def _note_format(cfg: RunConfig, found: record.Record, model: nn.Module, result: engine.Result) -> None:
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


def _device(wanted: str) -> torch.device:
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


def _neutral(raw: Json) -> Json:
    """The configuration without what cannot change a result."""
    return {key: value for key, value in raw.items() if key not in ("bits", "results_dir", "force", "save", *AROUND)}
