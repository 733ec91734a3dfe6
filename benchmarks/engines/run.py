"""Export, load in every engine, compare, and write the results."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compose import configuration
from benchmarks.engines import exports
from benchmarks.engines.cases import CASES, Case
from benchmarks.engines.table import markdown
from harness import quantization
from harness.calibration import relative_error
from harness.models import Decoder, open_quantized
from harness.records import environment
from harness.utils.errors import one_line

OUTPUT = Path(__file__).parents[2] / "results/benchmarks"
PROMPT = 64


def main(arguments: list[str]) -> None:
    """Compare all exports, or those whose name contains an argument; print the table and write both files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description="Load exports elsewhere.")
    parser.add_argument("names", nargs="*", help="parts of the names of exports; none: all, and the files are written")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if not options.names or any(name in _name(case) for name in options.names)]
    versions = {name: found for case in cases for engine in case.engines for name, found in engine.versions.items()}
    results = {
        "command": "python -m benchmarks.engines",
        "model": exports.MODEL,
        "prompt": PROMPT,
        "versions": versions,
        "rows": [row for case in cases for row in _rows(case)],
        "environment": asdict(environment()),
    }
    print(markdown(results))
    if not options.names:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / "engines.json").write_text(json.dumps(results, indent=1) + "\n")
        (OUTPUT / "engines.md").write_text(markdown(results))


def _name(case: Case) -> str:
    return f"{case.export} {case.settings}"


def _rows(case: Case) -> list[dict[str, Any]]:
    """A row for each engine of an export, with an error of the logits or the reason why there is none."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        exports.write(case, folder)
        expected = _logits(lambda: _ours(folder))
        rows = []
        for engine in case.engines:
            row: dict[str, Any] = {"export": case.export, "settings": case.settings, "engine": engine.name}
            try:
                row["error"] = relative_error(_logits(lambda load=engine.load: load(folder)), expected)  # type: ignore[misc]
            except Exception as reason:  # the other engines load the folder without it
                row["reason"] = one_line(reason)
            rows.append(row)
    return rows


def _ours(folder: Path) -> nn.Module:
    """The model of a folder, with what quantizes its inputs, by this project's reader."""
    cfg = configuration("execution=simulated", "method=checkpoint", f"model.path={folder}")
    source = open_quantized(cfg.model, cfg.seed)
    model = source.load(torch.float32, torch.device("cpu"))
    quantization.adopt(Decoder(model), source, cfg)
    return model


@torch.inference_mode()
def _logits(load: Callable[[], nn.Module]) -> Tensor:
    """The logits (1, PROMPT, V) of a model."""
    model = load()
    logits: Tensor = model(input_ids=exports.tokens(model, (1, PROMPT)), use_cache=False).logits
    return logits.float()
