"""Build all models, let them race, and write the results."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compose import configuration
from benchmarks.peers import llama, ours
from benchmarks.peers.race import race
from benchmarks.peers.table import markdown
from harness.calibration import relative_error
from harness.config import ModelConfig
from harness.evaluation.workload import Workload
from harness.models.exchange.gguf_file import write_gguf
from harness.models.packaged import find
from harness.nn import resident_bytes
from harness.records import environment
from harness.utils.errors import one_line

OUTPUT = Path(__file__).parents[2] / "results/benchmarks"
PROMPT, STEPS = 128, 32
_MIB = 2**20


@dataclass(frozen=True)
class Entry:
    """A model of conf/model, and the forms of it that race: those of this project and the types of llama.cpp."""

    model: str
    forms: tuple[ours.Form, ...]
    types: tuple[str, ...]

    @property
    def baseline(self) -> str:
        """The first form, eager."""
        return f"{self.forms[0].name}, eager"


_FLOAT, _BFLOAT = torch.float32, torch.bfloat16
ENTRIES = {
    "smollm2": Entry(
        "smollm2_raw",
        (
            ours.Form(),
            ours.Form(_BFLOAT),
            ours.Form(_FLOAT, 64),
            ours.Form(_FLOAT, 64, head=8),
            ours.Form(_BFLOAT, 64, head=8),
        ),
        ("F32", "BF16", "Q8_0", "Q4_0"),
    ),
    "llama3_2_1b": Entry(  # random weights; float32 would not leave enough memory to the others
        "llama3_2_1b_random",
        (ours.Form(_BFLOAT), ours.Form(_BFLOAT, 64, head=8), ours.Form(_FLOAT, 64, head=8)),
        ("BF16", "Q8_0", "Q4_0"),
    ),
}


@dataclass
class Field:
    """The models of a race.

    workloads  by name
    sizes      MiB of weights in memory, or of the file
    errors     relative error of the prompt's last logits
    absent     reasons why models are left out
    """

    prompt: Tensor
    decoded: Tensor
    expected: Tensor = field(default_factory=lambda: torch.zeros(0))
    workloads: dict[str, Workload] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str]) -> None:
    """Race all forms of the model of an entry, print the table and write both files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Time whole models.")
    parser.add_argument("entry", nargs="?", choices=ENTRIES, default="smollm2", help="the model")
    parser.add_argument("rounds", nargs="?", type=int, default=15, help="rounds that are timed")
    options = parser.parse_args(arguments)
    _main(options.entry, options.rounds)


def _main(name: str, rounds: int) -> None:
    entry = ENTRIES[name]
    model_cfg = configuration(f"model={entry.model}").model
    with tempfile.TemporaryDirectory() as folder:
        float_model = ours.load(model_cfg, ours.Form(_BFLOAT))
        racing = Field(*_tokens(float_model).split([PROMPT, STEPS], dim=1))
        source = _gguf(model_cfg, float_model, Path(folder))
        del float_model
        _add_ours(racing, model_cfg, entry.forms)
        _add_llama(racing, source, Path(folder), entry.types)
        figures = race(racing.workloads, entry.baseline, rounds)
    rows = [
        {"model": model, "mib": racing.sizes[model], "logits_error": racing.errors[model]} | asdict(figures[model])
        for model in racing.workloads
    ]
    shape = {
        "name": entry.model,
        "prompt": PROMPT,
        "steps": STEPS,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    results = shape | {
        "command": f"python -m benchmarks.peers {name} {rounds}",
        "baseline": entry.baseline,
        "rows": rows,
        "absent": racing.absent,
        "environment": asdict(environment()),
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / f"peers_{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (OUTPUT / f"peers_{name}.md").write_text(markdown(results))
    print(markdown(results))


def _tokens(model: nn.Module) -> Tensor:
    """Random tokens (1, PROMPT + STEPS) of the vocabulary of a model."""
    config: Any = model.config
    return torch.randint(config.vocab_size, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))


def _gguf(model_cfg: ModelConfig, model: nn.Module, folder: Path) -> Path:
    """A GGUF file of the same weights: the packaged one, or one of random weights."""
    if model_cfg.package:
        return find(model_cfg.package).whole(folder)
    write_gguf(folder / "model.gguf", model_cfg.name, model, {}, None)
    return folder / "model.gguf"


def _add_ours(racing: Field, model_cfg: ModelConfig, forms: tuple[ours.Form, ...]) -> None:
    torch.compiler.reset()
    for form in forms:
        model = ours.load(model_cfg, form)
        with torch.inference_mode():
            logits = model(input_ids=racing.prompt, use_cache=False).logits[0, -1].float()
        if not len(racing.expected):
            racing.expected = logits
        for runtime in ("eager", "compiled"):
            name = f"{form.name}, {runtime}"
            try:
                racing.workloads[name] = ours.workload(model, racing.prompt, racing.decoded, runtime)
            except Exception as reason:  # the others race without it
                racing.absent[name] = one_line(reason)
            else:
                racing.sizes[name] = resident_bytes(model) / _MIB
                racing.errors[name] = relative_error(logits, racing.expected)


def _add_llama(racing: Field, source: Path, folder: Path, types: tuple[str, ...]) -> None:
    try:
        files = {name: llama.write(source, folder / f"{name}.gguf", name) for name in types}
    except (ImportError, ValueError) as reason:
        racing.absent["llama.cpp"] = f"{one_line(reason)}; pip install ptqbench[peers]"
        return
    for name, file in files.items():
        for repacked in (False, True):
            label = f"llama.cpp {name}" + (", repacked" if repacked else "")
            if repacked and torch.cpu._is_amx_tile_supported():
                racing.absent[label] = "its AMX kernels crash"
                continue
            work = llama.Llama(file, racing.prompt, racing.decoded, repacked)
            work.prefill()
            racing.workloads[label], racing.sizes[label] = work, file.stat().st_size / _MIB
            racing.errors[label] = relative_error(work.logits(), racing.expected)
