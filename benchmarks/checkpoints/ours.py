"""Exports of this project at the bits of the other tools' files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.checkpoints.files import once

EXPORTS: dict[str, tuple[str, ...]] = {
    "ours_Q8_0": ("export=gguf", "method=rtn", "scheme=group32_sym", "bits=8"),
    "ours_Q5_0": ("export=gguf", "method=gptq", "scheme=group32_sym", "bits=5"),
    "ours_Q4_0": ("export=gguf", "method=gptq", "scheme=group32_sym", "bits=4"),
    "ours_8": ("export=compressed-tensors", "method=rtn", "scheme=channel_sym", "bits=8"),
    "ours_4": ("export=compressed-tensors", "method=awq_gptq", "scheme=group64", "bits=4"),
    "ours_3": ("export=compressed-tensors", "method=awq_gptq", "scheme=group64", "bits=3"),
    "ours_2": ("export=compressed-tensors", "method=gptq", "scheme=group64", "bits=2"),
}


def write(model: str, folder: Path) -> None:
    """Write the folder of each export."""
    for name, overrides in EXPORTS.items():
        once(folder / name, lambda part, overrides=overrides: _export(model, overrides, part))  # type: ignore[misc]


def _export(model: str, overrides: tuple[str, ...], part: Path) -> None:
    from benchmarks.compose import resolved
    from harness.runs import execute_run

    with tempfile.TemporaryDirectory() as results:
        common = (f"model={model}", "data=pydocs", "data.max_windows=1", "measure=off", f"results_dir={results}")
        record, _ = execute_run(resolved(*common, f"save={part}", *overrides))
    if problem := record.error or record.unsaved:
        raise SystemExit(problem)
