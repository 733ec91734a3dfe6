"""The benchmark of families: three families end to end, and checks that fail when they must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.families import checks, models
from benchmarks.families.cells import Cell, configuration, is_clear, run, text
from benchmarks.families.table import distinct, render
from harness.records import Record
from harness.runs import execute_run


def test_families_of_three_kinds_run_and_agree_with_transformers() -> None:
    cells = [cell for row in run(["llama", "gpt2", "bert"], ("none", "rtn"), 8, 1) for cell in row]
    assert [(cell.family, cell.method, cell.outcome, cell.lines) for cell in cells] == [
        (family, method, "ok", ()) for family in ("llama", "gpt2", "bert") for method in ("none", "rtn")
    ]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, checks.Reference]:
    """A run of rtn in 8 bits on a tiny Llama, and the same model by transformers."""
    work = tmp_path_factory.mktemp("families")
    models.save("llama", work / "llama")
    for name in ("evaluation", "calibration"):
        (work / f"{name}.txt").write_text(text(name))
    record, _ = execute_run(configuration(work, "llama", "rtn", 8))
    return record, checks.reference(work / "llama", text("evaluation"), 64, 2)


def test_a_right_record_has_no_violation(rounded: tuple[Record, checks.Reference]) -> None:
    record, reference = rounded
    assert record.status == "ok", record.error
    assert len(reference.linears) == 14
    assert checks.violations(record, "rtn", 8, reference) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nll": 0.01}, "nll differs from that of rounded weights"),
        ({"bits_per_weight": 0.1}, "bits_per_weight=8.850; counted 8.750"),
    ],
)
def test_a_wrong_metric_is_a_violation(
    rounded: tuple[Record, checks.Reference], changed: dict[str, float], message: str
) -> None:
    record, reference = rounded
    metrics = record.metrics | {name: record.metrics[name] + change for name, change in changed.items()}
    (line,) = checks.violations(replace(record, metrics=metrics), "rtn", 8, reference)
    assert message in line


def test_a_linear_that_stays_float_is_a_violation_without_a_warning(rounded: tuple[Record, checks.Reference]) -> None:
    record, reference = rounded
    silent = replace(record, layers=record.layers[1:])
    name = record.layers[0]["name"]
    lines = checks.violations(silent, "rtn", 8, reference)
    assert f"1 linears stay float without a warning: {name}" in lines
    warned = replace(silent, warnings=[f"{name} stays float"])
    assert not any("without a warning" in line for line in checks.violations(warned, "rtn", 8, reference))


def test_the_float_model_must_agree_with_transformers(rounded: tuple[Record, checks.Reference]) -> None:
    record, reference = rounded
    lines = checks.violations(record, "none", 8, reference)
    assert [line.split(" ")[0].split("=")[0] for line in lines] == ["kl", "perplexity"]


def test_a_lively_model_is_moved_by_rounding(rounded: tuple[Record, checks.Reference]) -> None:
    """Otherwise no check could see a wrong rewrite."""
    reference = rounded[1]
    assert checks.kl(reference.logits, checks.rounded_logits(reference, set(reference.linears), 2)) > 0.05
    assert checks.blind(reference) is None
    assert checks.blind(replace(reference, linears={})) is not None


@pytest.mark.parametrize(
    ("error", "clear"),
    [
        ("data.seq_len=64 is longer than the model's 32 positions; use a smaller data.seq_len", True),
        ("KeyError: 'x'; HYDRA_FULL_ERROR=1 shows the traceback", False),
        ("model.path=x cannot be read (AttributeError: no such thing)", False),
        ("x" * 201, False),
        ("too many values to unpack (expected 2)", False),
        ("", False),
    ],
)
def test_what_is_a_clear_error(error: str, clear: bool) -> None:
    assert is_clear(error) is clear


def test_messages_that_differ_in_numbers_are_one() -> None:
    cells = [Cell(family, "rtn", "refused", (f"model.path={family} has 3 of {i}",)) for i, family in enumerate("ab")]
    assert distinct(cells) == {"model.path=a has 3 of 0": "a, b (rtn)"}
    assert "| a | refused |" in list(render(cells, {}))


def test_shapes_name_families_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert len(models.families()) > 102
    assert set(models.left_out()) < set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_a_lively_model_keeps_special_parameters(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(8), "linear": torch.nn.Linear(8, 8)})
    decay = torch.nn.Parameter(torch.arange(1.0, 9.0).log())
    model.register_parameter("decay", decay)
    before = decay.detach().clone()
    models.liven(model)
    assert torch.equal(decay, before)
    assert model["norm"].weight.std() > 0.1
    assert model["norm"].bias.std() > 0
