"""One run, from a configuration to its record; and the command line that starts runs and sweeps."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from harness import data, engine, evaluate, linear, measure, models, record, table, text
from harness.config import RunConfig, build_run, method_source
from harness.errors import one_line

T = TypeVar("T")
Json = dict[str, Any]

CONF = Path(__file__).parent.parent / "conf"
_console = Console(stderr=True)


def run(cfg: RunConfig, found: record.Record) -> None:
    """Carry out one run, filling `found` stage by stage, so that a failure keeps what was reached.

    Raises: ValueError for whatever the configuration, the text or the weights do not allow.
    """
    device = _device(cfg.device)
    shape = models.config(cfg.model)
    dtype = models.resolve_dtype(cfg.model.dtype, shape)
    baseline_dtype = models.resolve_dtype(cfg.model.baseline_dtype, shape)
    found.warnings += cfg.warnings
    found.execution = _execution(cfg, device, dtype, baseline_dtype)
    _check_lengths(cfg, shape)
    engine.check(models.skeleton(shape), cfg)

    with _stage(found, "data"):
        stream, calibration = _tokens(cfg, found)
    with _stage(found, "load"):
        model = models.load(cfg.model, dtype, device, cfg.seed)
        found.model = models.provenance(cfg.model, model)
    with _stage(found, "quantize"):
        result = engine.quantize(model, cfg, calibration, _track)
    found.layers, found.warnings = result.layers, found.warnings + result.warnings
    found.metrics["bits_per_weight"] = result.bits_per_weight
    found.metrics["model_size_mib"] = linear.stored_bytes(model) / 2**20
    if cfg.steps:
        found.metrics["quantize_s"] = found.stages["quantize"]

    simulated = found.execution["mode"] == "simulated"
    with _stage(found, "evaluate"):
        unsure = measure.reset_peak_memory(device)
        scored = evaluate.perplexity(model, stream.windows, cfg.data.batch_size, _track)
        peak = measure.peak_memory_mib(device)
    found.window_nll, found.metrics["nll"] = scored.window_nll, scored.nll
    if scored.perplexity is None:
        found.warnings.append(f"perplexity is beyond the range of a float; nll={scored.nll:.6g} says how far")
    else:
        found.metrics["perplexity"] = scored.perplexity
    if not simulated:  # a simulated run holds decoded floats: its memory and speed say nothing of the format
        found.metrics["peak_memory_mib"] = peak
        found.warnings += [unsure] if unsure else []
    if cfg.measure.latency and not simulated:
        with _stage(found, "measure"):
            baseline = models.load(cfg.model, baseline_dtype, device, cfg.seed)
            found.metrics |= measure.latency(model, baseline, cfg.measure, cfg.seed, _track)


def execute(raw: Json, traceback: bool = False) -> tuple[record.Record, bool]:
    """Run what `raw`, the resolved configuration, says, unless its record is there already.

    Returns: the record, failed ones included, and whether it was there already.
    """
    folder = Path(str(raw.get("results_dir")))
    found = record.Record(run_id=record.run_id(_neutral(raw)), config=raw)
    try:
        cfg = build_run(raw)
        found.run_id = run_id(cfg, raw)
        done = None if cfg.force else record.finished(folder, found.run_id)
        if done is not None:
            return done, True
        found.environment = record.environment()
        torch.manual_seed(cfg.seed)
        run(cfg, found)
    except Exception as error:  # a sweep goes on: whatever went wrong is this run's result
        found.status, found.error = "failed", one_line(error)
        if traceback:
            _console.print_exception()
    finally:
        gc.collect()
    try:
        record.write(found, folder)
    except OSError as error:
        found.status = "failed"
        found.error = f"results_dir={folder} cannot be written ({error.strerror}); free space or name another folder"
    return found, False


def run_id(cfg: RunConfig, raw: Json) -> str:
    """Hash of what decides the result: configuration, weights, text, and the source of the method.

    Left out is what does not: `bits` beside the scheme's own, folders, batch size, and for the float
    baseline all that only quantization reads.
    """
    decides = _neutral(raw)
    decides["data"] = {key: value for key, value in raw["data"].items() if key not in ("path", "calibration_path")}
    decides["evaluation_text"] = text.identity(cfg.data, "evaluation")
    decides["model"] = asdict(cfg.model) | {"path": None, "fingerprint": models.fingerprint(cfg.model)}
    decides["device"] = str(_device(cfg.device))
    if engine.needs_calibration(cfg):
        decides["calibration_text"] = text.identity(cfg.data, "calibration")
    else:
        for key in ("num_samples", "calibration_seq_len", "sampling", "allow_overlap"):
            del decides["data"][key]
    del decides["data"]["batch_size"]
    for key in ("skip", "scheme", "execution") if not cfg.steps else ():
        del decides[key]
    decides["source"] = {name: text.sha256(method_source(step).encode()) for name, step in cfg.steps.items()}
    return record.run_id(decides)


def main() -> int:
    """Start the runs that the command line asks for and print their table; 0 if every one ended well."""
    shown: list[record.Record] = []
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(cfg: DictConfig) -> None:
        found, skipped = execute(_plain(cfg), wants_traceback)
        _report(found, skipped)
        shown.append(found)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing; told apart below
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        _fail(one_line(error))
        return 1
    except KeyboardInterrupt:
        _fail("interrupted; finished runs are kept and will be skipped next time")
        return 130
    if any(found.status == "ok" for found in shown):
        _show_table(shown)
    return 1 if any(found.status == "failed" for found in shown) else 0


def _tokens(cfg: RunConfig, found: record.Record) -> tuple[data.Tokens, torch.Tensor | None]:
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


def _execution(cfg: RunConfig, device: torch.device, dtype: torch.dtype, baseline: torch.dtype) -> Json:
    mode = cfg.execution if cfg.steps else "float"
    floats = {"dtype": str(dtype), "baseline_dtype": str(baseline)}
    found = {"mode": mode, "device": str(device)} | {key: name.removeprefix("torch.") for key, name in floats.items()}
    return found | ({"kernel": linear.KERNEL} if mode == "packed" else {})


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device={wanted} is unknown; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={wanted} is not available: torch {torch.__version__} sees no GPU; use device=cpu")
    return device


def _neutral(raw: Json) -> Json:
    """The configuration without what cannot change a result."""
    return {key: value for key, value in raw.items() if key not in ("bits", "results_dir", "force")}


def _plain(cfg: DictConfig) -> Json:
    return cast(Json, OmegaConf.to_container(cfg, resolve=True))


@contextmanager
def _stage(found: record.Record, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        found.stages[name] = time.perf_counter() - start


def _track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """A progress bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as progress:
        yield from progress.track(items, total=total, description=label)


def _report(found: record.Record, skipped: bool) -> None:
    label = escape(table.label(found))
    if skipped:
        _console.print(
            f"[dim]skip[/]  {label}: finished before as {found.run_id}; force=true repeats it", soft_wrap=True
        )
        return
    for warning in found.warnings:
        _console.print(f"[yellow]warn[/]  {label}: {escape(warning)}", highlight=False, soft_wrap=True)
    if found.status == "failed":
        _fail(f"{table.label(found)}: {found.error}")
    else:
        seconds = sum(found.stages.values())
        figure = found.metrics.get("perplexity", float("inf"))
        _console.print(
            f"[green]done[/]  {label}: perplexity {figure:.4g} in {seconds:.1f} s", highlight=False, soft_wrap=True
        )


def _show_table(shown: list[record.Record]) -> None:
    """The table of these runs, with ratios to float baselines that may be from an earlier command."""
    folder = Path(str(shown[0].config["results_dir"]))
    frame = table.to_frame([*shown, *(table.load(folder) if folder.is_dir() else ())])
    table.show(frame[frame["run_id"].isin([found.run_id for found in shown])])


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
