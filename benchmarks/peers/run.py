"""Build all models, let them race, and write the results."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import llama, ours
from benchmarks.peers.race import race
from benchmarks.peers.table import markdown
from harness.calibration import relative_error
from harness.evaluation.workload import Workload
from harness.models.packaged import find
from harness.nn import resident_bytes
from harness.records import environment
from harness.utils.errors import one_line

OUTPUT = Path(__file__).parents[2] / "results/benchmarks"
BASELINE = "float32, eager"
PROMPT, STEPS = 128, 32
_VOCABULARY = 49152
_MIB = 2**20


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


def main(rounds: int = 15) -> None:
    """Race all models, print the table and write both files."""
    tokens = torch.randint(_VOCABULARY, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    racing = Field(*tokens.split([PROMPT, STEPS], dim=1))
    with tempfile.TemporaryDirectory() as folder:
        _add_ours(racing)
        _add_llama(racing, Path(folder))
        figures = race(racing.workloads, BASELINE, rounds)
    rows = [
        {"model": name, "mib": racing.sizes[name], "logits_error": racing.errors[name]} | asdict(figures[name])
        for name in racing.workloads
    ]
    shape = {"prompt": PROMPT, "steps": STEPS, "rounds": rounds, "threads": torch.get_num_threads()}
    results = shape | {
        "baseline": BASELINE,
        "rows": rows,
        "absent": racing.absent,
        "environment": asdict(environment()),
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "peers.json").write_text(json.dumps(results, indent=1) + "\n")
    (OUTPUT / "peers.md").write_text(markdown(results))
    print(markdown(results))


def _add_ours(racing: Field) -> None:
    torch.compiler.reset()
    for form in ours.FORMS:
        model = ours.load(form)
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


def _add_llama(racing: Field, folder: Path) -> None:
    package = str(ours.MODEL.package)
    try:
        files = llama.write(find(package).whole(folder), folder)
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
