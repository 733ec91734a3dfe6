"""Sensitivities of linears and blocks, compared with runs of whole models in which one is exchanged; their ranking."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.cli import attribution as command
from harness.config import RunConfig, build_run
from harness.evaluation import sensitivity
from harness.models import Decoder, weight_of
from harness.nn import swapped
from harness.quantization.engine import Result
from harness.records import Analysis, Record, Weights, write
from harness.reports import attribution
from harness.runs import execute_run
from harness.runs.analysis import Analyser
from harness.utils.disk_cache import DiskCache
from tests.conftest import run_id_of
from tests.support.blocks import TOKENS, logits, relative
from tests.support.decoders import linears, quantize, sensitivities
from tests.support.families import build, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")

Tiny = Callable[..., dict[str, Any]]
LINEAR = ("analysis.sensitivity=linear", "scheme=channel", "bits=3")
NO_CACHE = DiskCache(Path(), 0)


def naive_kl(reference: Tensor, quantized: Tensor) -> float:
    """Mean KL of logits (B, T, V) over the first T - 1 positions, which have a next token."""
    P, Q = (logits[:, :-1].double().softmax(-1) for logits in (reference, quantized))
    return float((P * (P / Q).log()).sum(-1).mean())


def naive_nll(quantized: Tensor, tokens: Tensor = TOKENS) -> float:
    Q = quantized[:, :-1].double().softmax(-1)
    return float(-Q.gather(-1, tokens[:, 1:, None]).log().mean())


def quantized(tiny: Tiny, family: str, *options: str, exact: bool = True) -> tuple[nn.Module, Result, RunConfig]:
    model = uneven(build(family))
    cfg = build_run(tiny(*LINEAR, *options))
    model = model.double() if exact else model
    return model, quantize(model, cfg, TOKENS), cfg


def with_only(model: nn.Module, modules: dict[str, nn.Module]) -> Tensor:
    """Logits of a copy of the model in which `modules` replace the modules of the same names."""
    other = copy.deepcopy(model)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(other.get_submodule(parent), child, copy.deepcopy(module))
    return logits(other)


# OPT projects the blocks' output, GPT-2 has other linears, Falcon's branches run side by side, Gemma 2 caps its logits.
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "gemma2"])
def test_figures_of_each_linear_equal_those_of_whole_models(tiny: Tiny, family: str) -> None:
    model, result, _ = quantized(tiny, family)
    plain = uneven(build(family)).double()
    measured = sensitivities(model, result.floats, TOKENS, "linear")
    expected = logits(plain)
    assert [row["name"] for row in measured.rows] == [row["name"] for row in result.layers]
    for row in measured.rows:
        name = row["name"]
        alone = with_only(plain, {name: model.get_submodule(name)})
        without = with_only(model, {name: plain.get_submodule(name)})
        assert row["kl_alone"] == pytest.approx(naive_kl(expected, alone), rel=1e-6, abs=1e-14), name
        assert row["kl_without"] == pytest.approx(naive_kl(expected, without), rel=1e-6, abs=1e-14), name
        assert row["nll_alone"] == pytest.approx(naive_nll(alone), rel=1e-9)
        assert row["nll_without"] == pytest.approx(naive_nll(without), rel=1e-9)
        assert row["params"] == weight_of(plain.get_submodule(name)).numel()
    assert measured.all.kl == pytest.approx(naive_kl(expected, logits(model)), rel=1e-6)
    assert measured.all.nll == pytest.approx(naive_nll(logits(model)), rel=1e-9)
    assert (measured.none.kl, measured.none.nll) == (0.0, pytest.approx(naive_nll(expected), rel=1e-9))
    assert sum(row["kl_alone"] for row in measured.rows) > 1e-4, "otherwise the comparison would test nothing"


def test_a_block_counts_all_its_linears(tiny: Tiny) -> None:
    model, result, _ = quantized(tiny, "llama")
    plain = uneven(build("llama")).double()
    before = logits(model)
    measured = sensitivities(model, result.floats, TOKENS, "block")
    assert [row["name"] for row in measured.rows] == ["model.layers.0", "model.layers.1"]
    for row in measured.rows:
        members = [name for name in result.floats if name.startswith(f"{row['name']}.")]
        assert len(members) == 7
        alone = with_only(plain, {name: model.get_submodule(name) for name in members})
        without = with_only(model, {name: plain.get_submodule(name) for name in members})
        assert row["kl_alone"] == pytest.approx(naive_kl(logits(plain), alone), rel=1e-6)
        assert row["kl_without"] == pytest.approx(naive_kl(logits(plain), without), rel=1e-6)
        assert row["params"] == sum(weight_of(plain.get_submodule(name)).numel() for name in members)
    assert torch.equal(logits(model), before), "the model is unchanged"


def test_with_one_quantized_linear_its_cost_is_that_of_the_whole_model(tiny: Tiny) -> None:
    only = "model.layers.0.mlp.up_proj"
    others = [name for name in linears(build("llama")) if name != only]
    model, result, _ = quantized(tiny, "llama", f"skip=[{','.join(others)}]", exact=False)
    measured = sensitivities(model, result.floats, TOKENS, "linear")
    (row,) = measured.rows
    assert row["name"] == only
    assert row["kl_alone"] == measured.all.kl > 1e-5
    assert row["nll_alone"] == measured.all.nll
    assert row["kl_without"] == 0.0
    assert row["nll_without"] == measured.none.nll


@pytest.mark.parametrize("execution", ["packed", "simulated"])
@pytest.mark.parametrize("method", ["smoothquant", "awq", "smoothquant_gptq", "rotate"])
def test_weights_are_exchanged_within_the_rewritten_model(tiny: Tiny, method: str, execution: str) -> None:
    model, result, _ = quantized(tiny, "llama", f"method={method}", f"execution={execution}")
    plain, base = uneven(build("llama")).double(), copy.deepcopy(model)
    for name, module in result.floats.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module)
    expected = logits(plain)
    assert relative(logits(base), expected) < 1e-4, "rewrites keep the function"
    measured = sensitivities(model, result.floats, TOKENS, "linear")
    assert measured.none.nll == pytest.approx(naive_nll(expected), rel=1e-4)
    for row in measured.rows:
        alone = with_only(base, {row["name"]: model.get_submodule(row["name"])})
        without = with_only(model, {row["name"]: result.floats[row["name"]]})
        assert row["kl_alone"] == pytest.approx(naive_kl(logits(base), alone), rel=1e-6)
        assert row["kl_without"] == pytest.approx(naive_kl(logits(base), without), rel=1e-6)
        assert row["kl_alone"] == pytest.approx(naive_kl(expected, alone), rel=0.05), (
            "the figure does not include the scale of the rewrite"
        )


def test_slices_and_recomputed_logits_give_the_same_figures(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, result, _ = quantized(tiny, "llama")
    whole = sensitivities(model, result.floats, TOKENS, "block")
    monkeypatch.setattr(sensitivity, "_LOGIT_ELEMENTS", 4 * 128)
    sliced = sensitivities(model, result.floats, TOKENS, "block")
    monkeypatch.setattr(sensitivity, "_STORED_ELEMENTS", 0)
    recomputed = sensitivities(model, result.floats, TOKENS, "block")
    for key in ("kl_alone", "nll_alone", "kl_without", "nll_without"):
        figures = [[row[key] for row in measured.rows] for measured in (whole, sliced, recomputed)]
        assert figures[1] == pytest.approx(figures[0], rel=1e-9)
        assert figures[2] == figures[1]


def test_logits_that_are_not_finite_are_refused_with_the_name_of_the_linear(tiny: Tiny) -> None:
    model, result, _ = quantized(tiny, "llama", exact=False)
    name = "model.layers.1.mlp.up_proj"
    model.get_submodule(name).bias = torch.full((64,), torch.inf)
    with pytest.raises(ValueError, match=f"logits are not finite with {name} exchanged"):
        sensitivities(model, result.floats, TOKENS, "linear")


def inputs_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Inputs (T, K) of the linears `names` on TOKENS."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: inputs[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in inputs.items()}


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_hessian_error_is_the_output_error_over_all_tokens(tiny: Tiny, method: str) -> None:
    model, result, _ = quantized(tiny, "llama", f"method={method}", "engine.propagate=float", "execution=packed")
    names = [row["name"] for row in result.layers]
    with swapped(model, result.floats):
        inputs = inputs_of(model, names)
    for row in result.layers:
        weight, x = weight_of(result.floats[row["name"]]), inputs[row["name"]]
        decoded = model.get_submodule(row["name"]).packed.dequantize(torch.float64)  # type: ignore[union-attr,operator]
        assert row["hessian_error"] == pytest.approx(relative(x @ decoded.T, x @ weight.T), rel=1e-4)


def test_methods_without_a_hessian_collect_one_only_for_the_analysis(tiny: Tiny) -> None:
    result = quantize(build("llama"), build_run(tiny("scheme=channel")), TOKENS)
    assert not any("hessian_error" in row or "output_error" in row for row in result.layers)
    assert result.floats == {}
    gptq = quantize(build("llama"), build_run(tiny("scheme=channel", "method=gptq")), TOKENS)
    assert all(0 < row["hessian_error"] < 1 for row in gptq.layers)


@pytest.mark.parametrize("method", ["smoothquant", "rotate"])
def test_outliers_before_and_after_rewrites(tiny: Tiny, method: str) -> None:
    model = uneven(build("llama"))
    cfg = build_run(tiny("scheme=channel", f"method={method}", "analysis.outliers=[*layers.1*]"))
    names = [name for name in linears(model) if "layers.1." in name]
    before = inputs_of(model, names)
    analyser = Analyser(Decoder(model), cfg, TOKENS, NO_CACHE)
    result = quantize(model, cfg, TOKENS)
    with swapped(model, result.floats):
        after = inputs_of(model, [result.renamed[name] for name in names])
    outliers = analyser.analyse(result).outliers
    firsts = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert list(outliers) == [f"model.layers.1.{name}" for name in firsts], "one entry for each input"
    for name, largest in outliers.items():
        assert largest["before"] == pytest.approx(before[name].abs().amax(0).tolist(), rel=1e-3)
        assert largest["after"] == pytest.approx(after[result.renamed[name]].abs().amax(0).tolist(), rel=1e-3)
        assert all(value == float(f"{value:.4g}") for value in largest["before"])
    assert outliers["model.layers.1.mlp.down_proj"]["before"] != outliers["model.layers.1.mlp.down_proj"]["after"]
    assert result.floats == {}


def test_the_record_has_it_and_the_figures_of_the_run_stay(tiny: Tiny) -> None:
    options = ("bits=2", "method=rtn", "execution=simulated")
    found, _ = execute_run(tiny(*options, "analysis.sensitivity=linear", "analysis.windows=2"))
    plain, _ = execute_run(tiny(*options))
    assert found.status == plain.status == "ok", found.error
    assert found.metrics["perplexity"] == plain.metrics["perplexity"]
    assert "quantize_s" not in found.metrics, "it would be the analysis's too"
    assert found.options == {"analysis.sensitivity": "linear", "analysis.windows": 2}
    total = found.analysis.total
    assert (total["by"], total["windows"], total["seq_len"]) == ("linear", 2, 32)
    assert total["kl"] > 0
    rows = {row["name"]: row for row in found.layers}
    for row in found.analysis.sensitivity:
        assert {"kl_alone", "kl_without", "nll_alone", "nll_without"} <= set(row) & set(rows[row["name"]])
        assert rows[row["name"]]["kl_alone"] == row["kl_alone"]
        assert "hessian_error" in rows[row["name"]]
    assert plain.analysis == Analysis()
    assert set(plain.layers[0]) == {"name", "shape", "stored_bits", "bits_per_weight", "weight_error", "weight_norm"}


def test_blocks_are_rows_of_their_own(tiny: Tiny) -> None:
    found, _ = execute_run(tiny("bits=2", "analysis.sensitivity=block", "execution=simulated"))
    assert [row["name"] for row in found.analysis.sensitivity] == ["model.layers.0", "model.layers.1"]
    assert not any("kl_alone" in row for row in found.layers)


def test_what_decides_the_id_of_a_run(tiny: Tiny) -> None:
    def identity(*options: str) -> str:
        raw = tiny(*options)
        return run_id_of(raw)

    assert identity() == identity("analysis.windows=2"), "nothing is asked"
    assert identity() != identity("analysis.sensitivity=block")
    assert identity("analysis.sensitivity=block") != identity("analysis.sensitivity=block", "analysis.windows=2")
    assert identity("method=none") == identity("method=none", "analysis.sensitivity=block")
    assert not build_run(tiny("method=none", "analysis.sensitivity=block")).analyses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["analysis.sensitivity=layer"], "^analysis.sensitivity='layer' is unknown; .*off, block, linear"),
        (["analysis.sensitivity=linear", "analysis.windows=9"], "^analysis.windows=9 exceeds the data.num_samples=4 "),
        (["analysis.sensitivity=linear", "analysis.windows=0"], "^analysis.windows=0 is out of range; expected 1"),
        (["analysis.outliers=[*nothing*]"], r"^analysis.outliers=\*nothing\* matches no linear; expected a pattern"),
        (
            ["analysis.sensitivity=linear", "method=quip_sharp", "scheme=none"],
            "^analysis with method.quip_sharp, which is fine-tuned: .* expected method.quip_sharp.epochs=0",
        ),
    ],
)
def test_what_cannot_be_analysed_is_refused(tiny: Tiny, options: list[str], message: str) -> None:
    found, _ = execute_run(tiny(*options))
    assert found.status == "failed"
    assert found.error is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(found.error)


def test_spearman_by_hand() -> None:
    assert attribution.spearman([1.0, 2.0, 3.0], [10.0, 100.0, 1e9]) == pytest.approx(1)
    assert attribution.spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5, variances 4.5 and 5
    assert attribution.spearman([1.0, 2.0, 2.0, 5.0], [0.0, 7.0, 3.0, 8.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def ranked_record() -> Record:
    same = {"nll_alone": 2.0, "kl_without": 0.1, "nll_without": 2.1, "params": 6}
    units = [{"name": "a", "kl_alone": 0.1} | same, {"name": "b", "kl_alone": 0.3} | same]
    layers = [
        {"name": "a", "shape": [2, 3], "stored_bits": 18, "weight_error": 0.2, "hessian_error": 0.1},
        {"name": "b", "shape": [2, 3], "stored_bits": 18, "weight_error": 0.1, "hessian_error": 0.3},
    ]
    total = {"by": "linear", "windows": 4, "seq_len": 32, "kl": 0.5, "nll": 2.4, "nll_float": 2.0}
    return Record(
        "id",
        config={"scheme": {"name": "group64", "weight": {"bits": 3}}, "method": {"rtn": {}}},
        model=Weights(name="m"),
        layers=layers,
        analysis=Analysis(sensitivity=units, total=total),
    )


@pytest.mark.parametrize("stale", [set(), {"id"}])
def test_the_ranking_is_by_kl_alone_with_shares_and_correlations(
    stale: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ranked_record()
    assert {row["name"]: row["share"] for row in attribution.ranked(found)} == pytest.approx({"b": 0.75, "a": 0.25})
    assert attribution.correlations(attribution.ranked(found)) == pytest.approx(
        {"weight_error": -1, "hessian_error": 1}
    )
    monkeypatch.setattr(command, "stale_ids", lambda _: stale)
    write(found, tmp_path)
    write(replace(found, run_id="other", analysis=Analysis()), tmp_path)
    assert command.main([f"runs={tmp_path}", "top=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("m rtn group64 bits=3, by linear, 4 calibration sequences of 32 tokens")
    assert lines[0].endswith("†") == (lines[-1].startswith("†")) == bool(stale)
    assert "sum over each alone: KL 0.4" in lines[2]
    assert lines[4] == "rank correlation with KL alone: Hessian error 1.00, weight error -1.00"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0][:5] == ["rank", "name", "KL alone", "share", "KL without"]
    assert [row[:4] for row in rows[2:]] == [["1", "b", "0.3", "75.0%"]], "the second is beyond top=1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["top=0"], "top=0 is no number of rows; expected 1 or more"),
        (["first=3"], "first=3 is unknown; expected one of: runs, top"),
        ([], "holds no finished run with analysis.sensitivity; run one with it first"),
    ],
)
def test_the_ranking_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main([f"runs={tmp_path}", *arguments]) == 1
    assert message in capsys.readouterr().err
