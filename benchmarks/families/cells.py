"""Runs one cell of the table, a family by a method, and judges it."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.families import checks, models

ROOT = Path(__file__).parent.parent.parent
METHODS = ("none", "rtn", "gptq", "awq", "smoothquant", "rotate")
SEQ_LEN, WINDOWS = 64, 2
_LONGEST = 200  # characters of an error message

Outcome = Literal["ok", "warned", "refused", "BUG", "SILENT", "unbuilt"]


@dataclass(frozen=True)
class Cell:
    """The outcome of one run, with the lines that explain it: the error, the violations, or the warnings."""

    family: str
    method: str
    outcome: Outcome
    lines: tuple[str, ...] = ()


def run(families: list[str], methods: tuple[str, ...], bits: int, processes: int) -> Iterator[list[Cell]]:
    """The cells of each family; a family is done by one of `processes` processes, or by this one."""
    if processes == 1:
        _start()
        yield from (run_family(family, methods, bits) for family in families)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start) as pool:
        jobs = [pool.submit(run_family, family, methods, bits) for family in families]
        yield from (job.result() for job in jobs)


def run_family(family: str, methods: tuple[str, ...], bits: int) -> list[Cell]:
    """All cells of a family; one cell `unbuilt` if transformers cannot build, save or run its tiny model."""
    with _workspace() as work:
        folder = work / family
        try:
            models.save(family, folder)
            reference = checks.reference(folder, text("evaluation"), SEQ_LEN, WINDOWS)
            reason = checks.blind(reference)
        except Exception as error:  # whatever transformers raises
            reason = _line(error)
        if reason:
            return [Cell(family, method, "unbuilt", (reason,)) for method in methods]
        return [run_cell(family, method, bits, work, reference) for method in methods]


def run_cell(family: str, method: str, bits: int, work: Path, reference: checks.Reference) -> Cell:
    """Run one method on the saved model and judge its record."""
    from harness.runs import execute_run

    def cell(outcome: Outcome, lines: Sequence[str]) -> Cell:
        return Cell(family, method, outcome, tuple(line.replace(str(work), "FOLDER") for line in lines))

    record, _ = execute_run(configuration(work, family, method, bits))
    if record.status != "ok":
        error = str(record.error)
        return cell("refused" if is_clear(error) else "BUG", [error])
    wrong = checks.violations(record, method, bits, reference)
    return cell("SILENT", wrong) if wrong else cell("warned" if record.warnings else "ok", record.warnings)


def is_clear(error: str) -> bool:
    """Whether an error message is one line of at most 200 characters that starts with a key or a name, and no bug."""
    bug = (
        not re.match(r"[\w.*+-]+(=|: )", error)
        or "HYDRA_FULL_ERROR" in error
        or re.search(r"\b[A-Z]\w*(Error|Exception)\b", error)
    )
    return not bug and "\n" not in error and 0 < len(error) <= _LONGEST


def configuration(work: Path, family: str, method: str, bits: int) -> dict[str, Any]:
    """The resolved configuration of a cell: the default measure, in the smallest sizes."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    sizes = {"seq_len": SEQ_LEN, "max_windows": WINDOWS, "num_samples": 4, "calibration_seq_len": 32}
    times = {"prompt_len": 16, "decode_tokens": 2, "warmup": 1, "repeats": 1}
    overrides = [f"model.path={work / family}", f"method={method}", f"bits={bits}", f"scheme=group{checks.GROUP}"]
    overrides += ["data=text_file", f"data.path={work / 'evaluation.txt'}"]
    overrides += [f"data.calibration_path={work / 'calibration.txt'}", f"results_dir={work / 'runs'}", "device=cpu"]
    overrides += [f"data.{key}={value}" for key, value in sizes.items()]
    overrides += [f"measure.{key}={value}" for key, value in times.items()]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        resolved: dict[str, Any] = OmegaConf.to_container(compose("config", overrides), resolve=True)  # type: ignore[assignment]
    return resolved


def text(name: str) -> str:
    """A text of numbered lines; those for evaluation and for calibration share no line."""
    factor, shift = (7, 0) if name == "evaluation" else (11, 1)
    return "\n".join(f"line {i * factor}: value {i * i + shift} of {name}" for i in range(400))


@contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary folder with both texts, which is also the cache folder of the harness."""
    work = Path(tempfile.mkdtemp(prefix="families-"))
    before = os.environ.get("PTQBENCH_CACHE")
    os.environ["PTQBENCH_CACHE"] = str(work / "cache")
    try:
        for name in ("evaluation", "calibration"):
            (work / f"{name}.txt").write_text(text(name))
        yield work
    finally:
        os.environ.pop("PTQBENCH_CACHE") if before is None else os.environ.update(PTQBENCH_CACHE=before)
        shutil.rmtree(work, ignore_errors=True)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _start() -> None:
    """Prepare a process: one thread, no network, no warnings of transformers."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
