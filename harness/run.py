"""One run: from a configuration, through the stages of the data flow, to its record."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import checkpoint, data, engine, evaluate, linear, measure, models, record, text
from harness.config import RunConfig, build_run, changed_options, source_files
from harness.embedded import cache_dir
from harness.errors import one_line
from harness.kernels import table
from harness.progress import Track, silent
from harness.statcache import StatCache

Json = dict[str, Any]

_HERE = Path(__file__).parent
_ARITHMETIC = (
    "architecture.py",
    "data.py",
    "engine.py",
    "evaluate.py",
    "finetune.py",
    "flow.py",
    "install.py",
    "linear.py",
    "measure.py",
    "observe.py",
    "producers.py",
    "residual.py",
    "shortcut.py",
    "stream.py",
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
    with _stage(found, "load", track):  # the first time, this converts the embedded model
        shape = models.config(cfg.model)
        _check(cfg, shape, found)
    device = _device(cfg.device)
    dtype = models.resolve_dtype(cfg.model.dtype, shape)
    baseline_dtype = models.resolve_dtype(cfg.model.baseline_dtype, shape)
    found.execution = _execution(cfg, device, dtype, baseline_dtype)

    with _stage(found, "data", track):
        stream, calibration = _tokens(cfg, found)
    with _stage(found, "load", track):
        model = models.load(cfg.model, dtype, device, cfg.seed)
        found.model = models.provenance(cfg.model, model, cfg.seed)
    unsure = measure.reset_peak_memory(device)
    with _stage(found, "quantize"):
        cache = StatCache(cache_dir() / "statistics", int(cfg.engine.cache_gib * 2**30))
        result = engine.quantize(model, cfg, stream.windows[:1] if calibration is None else calibration, track, cache)
    _note_format(found, model, result)
    if cfg.save is not None and cfg.scheme is not None:
        checkpoint.save(model, result.weights, cfg.scheme, found.model, Path(cfg.save))
        result.weights.clear()
    if cfg.steps and not unsure:
        found.metrics["quantize_peak_mib"] = measure.peak_memory_mib(device)
    with _stage(found, "evaluate"):
        _evaluate(cfg, model, stream.windows, found, track)
    if cfg.measure.latency and found.execution["mode"] != "simulated":
        with _stage(found, "measure"):
            baseline = models.load(cfg.model, baseline_dtype, device, cfg.seed)
            found.metrics |= measure.latency(model, baseline, cfg.measure, cfg.seed, track)


def execute(raw: Json, track: Track = silent, show_traceback: bool = False) -> tuple[record.Record, bool]:
    """Run what `raw`, the resolved configuration, says, unless its record is there already.

    Returns: the record, failed ones included, and whether it was there already.
    """
    early = record.run_id(_neutral(raw))  # stands for a run that fails before all that decides it is known
    found = record.Record(run_id=early, config=raw)
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
    try:
        record.write(found, folder)
        if found.status == "ok":
            record.path_of(folder, early).unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a full disk; a figure that JSON cannot hold
        found.status = "failed"
        found.error = f"results_dir={folder}: the record cannot be written ({error}); free space or name another folder"
    return found, False


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
    if engine.needs_calibration(cfg):
        decides["calibration_text"] = text.identity(cfg.data, "calibration")
    else:
        for key in ("num_samples", "calibration_seq_len", "sampling", "allow_overlap"):
            del decides["data"][key]
        del decides["engine"]
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


def _note_format(found: record.Record, model: nn.Module, result: engine.Result) -> None:
    """What the quantized model is, before anything is asked of it."""
    found.layers = result.layers
    found.warnings += result.warnings
    found.metrics["bits_per_weight"] = result.bits_per_weight
    found.metrics["model_size_mib"] = linear.stored_bytes(model) / 2**20
    if found.execution["mode"] != "simulated":
        found.metrics["resident_mib"] = linear.resident_bytes(model) / 2**20
    if result.kernels:
        found.execution["kernel"] = ", ".join(sorted(result.kernels))
    if found.execution["mode"] != "float":
        found.metrics["quantize_s"] = found.stages["quantize"]


def _evaluate(cfg: RunConfig, model: nn.Module, windows: Tensor, found: record.Record, track: Track) -> None:
    """Perplexity, and the peak of memory on the way; of a model that is not scored, the peak of one prefill.

    A simulated run holds decoded floats: its memory says nothing of the format, and is not reported.
    """
    device = next(model.parameters()).device
    unsure = measure.reset_peak_memory(device)
    if cfg.model.scored:
        scored = evaluate.perplexity(model, windows, cfg.data.batch_size, track)
    else:
        measure.prefill(model, cfg.measure, cfg.seed)
    if found.execution["mode"] != "simulated":
        found.metrics["peak_memory_mib"] = measure.peak_memory_mib(device)
        found.warnings += [unsure] if unsure else []
    if not cfg.model.scored:
        found.warnings.append(f"model={cfg.model.name} has random weights: no perplexity is computed, it means nothing")
        return
    found.window_nll, found.metrics["nll"] = scored.window_nll, scored.nll
    if scored.perplexity is None:
        found.warnings.append(f"perplexity is beyond the range of a float; nll={scored.nll:.6g} says how far")
    else:
        found.metrics["perplexity"] = scored.perplexity


def _execution(cfg: RunConfig, device: torch.device, dtype: torch.dtype, baseline: torch.dtype) -> Json:
    mode = cfg.execution if cfg.steps else "float"
    floats = {"dtype": str(dtype), "baseline_dtype": str(baseline)}
    return {"mode": mode, "device": str(device)} | {key: name.removeprefix("torch.") for key, name in floats.items()}


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
    return {key: value for key, value in raw.items() if key not in ("bits", "results_dir", "force", "save")}


@contextmanager
def _stage(found: record.Record, name: str, track: Track = silent) -> Iterator[None]:
    """Time a stage. `track` is for those with no steps of their own to count: it shows that they go on."""
    shown = track([name], name, 1)
    start = time.perf_counter()
    try:
        next(shown)
        yield
    finally:
        found.stages[name] = found.stages.get(name, 0.0) + time.perf_counter() - start
        shown.close()
