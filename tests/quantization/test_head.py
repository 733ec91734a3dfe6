"""A quantized output head: its logits, its size beside a tied embedding, its place in records and tables, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from harness.config import build_run
from harness.kernels.native import library
from harness.nn import QuantLinear, stored_bytes
from harness.quantization import pack_head, quantize_head
from harness.reports import to_frame
from harness.reports.describe import describe, label
from harness.runs import execute_run
from tests.conftest import resolve, run_id_of
from tests.support.blocks import TOKENS, logits, relative
from tests.support.families import build, uneven

Tiny = Callable[..., dict[str, Any]]


def naive(weight: Tensor, bits: int) -> Tensor:
    """The decoded weight (N, K), one group of 32 inputs after another, in float64."""
    most, out = 2 ** (bits - 1) - 1, weight.double().clone()
    for row in out:
        for group in row.split(32):
            scale = float((group.abs().max() / most).half())
            group.copy_((group / scale).round().clamp(-most - 1, most) * scale)
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox"])
@pytest.mark.parametrize("execution", ["packed", "simulated"])
def test_logits_are_those_of_the_rounded_weight_and_the_embedding_stays(family: str, execution: str) -> None:
    model, expected = (uneven(build(family, tie_word_embeddings=True, vocab_size=96)) for _ in range(2))
    tokens = TOKENS % 96
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    row, kernel = quantize_head(model, 4, execution, [])
    assert row["bits_per_weight"] == 4.5
    assert (kernel is None) == (execution == "simulated")
    assert model.get_input_embeddings().weight is embedding
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    head = expected.get_output_embeddings()
    head.weight = nn.Parameter(naive(head.weight.detach(), 4).float())
    assert relative(logits(model, tokens), logits(expected, tokens)) < 1e-5
    assert relative(logits(model, tokens), logits(uneven(build(family, vocab_size=96)), tokens)) > 1e-2


@pytest.mark.parametrize(
    ("option", "kernel"),
    [
        ("method=rtn", "native_dense"),
        ("execution=simulated", None),
        ("method=none", None),
        ("head=8", None),
    ],
)
def test_the_record_names_the_kernel_of_a_float_head(tiny: Tiny, option: str, kernel: str | None) -> None:
    expected = kernel if library.available() else None
    assert execute_run(tiny(option))[0].execution.head == expected


def test_without_the_library_the_head_stays_as_it_is(torch_kernels: None) -> None:
    model = build("llama")
    head = model.get_output_embeddings()
    assert pack_head(model) is None
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox"])
def test_a_float_head_keeps_its_logits_and_its_weight(family: str) -> None:
    model = uneven(build(family, tie_word_embeddings=True, vocab_size=96))
    expected, embedding = logits(model, TOKENS % 96), model.get_input_embeddings().weight
    kernel = pack_head(model)
    assert kernel == ("native_dense" if library.available() else None)
    assert relative(logits(model, TOKENS % 96), expected) < 1e-6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is embedding


def test_head_and_tied_embedding_are_both_stored() -> None:
    model = build("llama", tie_word_embeddings=True)
    before, weights = stored_bytes(model), model.get_output_embeddings().weight.numel()
    quantize_head(model, 8, "packed", [])
    assert stored_bytes(model) - before == weights * 8.5 / 8
    model = build("llama", tie_word_embeddings=False)
    before = stored_bytes(model)
    quantize_head(model, 8, "packed", [])
    assert stored_bytes(model) - before == weights * 8.5 / 8 - 4 * weights


def test_runs_score_the_quantized_head(tiny: Tiny) -> None:
    timed = ("measure=quick", "measure.prompt_len=8", "measure.decode_tokens=1", "measure.repeats=1")
    baseline, *heads, simulated = (
        execute_run(tiny(*timed, "method=none", *options))[0]
        for options in ((), ("head=8",), ("head=3",), ("head=3", "execution=simulated"))
    )
    for record in (baseline, *heads, simulated):
        assert record.status == "ok", record.error
        assert record.metrics["bits_per_weight"] == 32
    kl = [record.metrics["kl"] for record in (baseline, *heads)]
    assert kl[0] == 0 < 10 * kl[1] < kl[2]
    assert heads[1].metrics["perplexity"] != baseline.metrics["perplexity"]
    assert simulated.metrics["perplexity"] == pytest.approx(heads[1].metrics["perplexity"], rel=1e-6)
    assert "decode_ms_p50" in heads[0].metrics
    assert "decode_ms_p50" not in simulated.metrics
    assert heads[0].execution.mode == "packed"
    assert heads[0].execution.kernel
    assert heads[0].layers[-1]["name"] == "lm_head"
    assert heads[0].metrics["model_size_mib"] - baseline.metrics["model_size_mib"] == 256 * 64 * 8.5 / 8 / 2**20
    frame = to_frame([baseline, *heads]).set_index("run_id")
    assert list(frame.loc[[record.run_id for record in heads], "options"]) == ["head=8", "head=3"]
    ratio = heads[1].metrics["perplexity"] / baseline.metrics["perplexity"]
    assert frame.loc[heads[1].run_id, "perplexity_ratio"] == ratio, "a float head is the baseline"


@pytest.mark.parametrize("options", [("method=rtn",), ("method=rotate", "scheme=w4a4_token")])
def test_methods_and_their_figures_stay_the_same(tiny: Tiny, options: tuple[str, ...]) -> None:
    alone, record = (execute_run(tiny(*options, *head))[0] for head in ((), ("head=8",)))
    assert record.status == "ok", record.error
    for name in ("bits_per_weight", "quantized_share", "total_weight_error"):
        assert record.metrics[name] == alone.metrics[name]
    assert record.layers[:-1] == alone.layers
    assert record.metrics["kl"] != alone.metrics["kl"]
    assert record.metrics["kl"] == pytest.approx(alone.metrics["kl"], rel=0.2)
    assert describe(record)["options"] == "head=8"
    assert "head=8" in label(record)


def test_the_head_is_part_of_the_run_id(tiny: Tiny) -> None:
    ids = {run_id_of(tiny("method=none", *options)) for options in ((), ("head=8",), ("head=4",))}
    assert len(ids) == 3
    before = tiny("method=none")
    del before["head"]
    assert run_id_of(before) in ids
    simulated = run_id_of(tiny("method=none", "execution=simulated"))
    assert simulated in ids
    assert run_id_of(tiny("method=none", "head=8", "execution=simulated")) not in ids


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head=9"], r"^head=9 is out of range; expected 2 to 8 bits, or null for a float head$"),
        (["head=8", "save=x"], r"^save=x with head=8: the file holds .* expected save=null, or head=null$"),
    ],
)
def test_settings_that_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_run(resolve("model=tiny", *overrides))


def test_a_head_that_cannot_be_quantized_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny("method=none", "head=8")
    raw["model"]["architecture"] |= {"hidden_size": 48}
    record = execute_run(raw)[0]
    assert record.error == "head=8: the 48 inputs of lm_head are not whole groups of 32; use head=null"
    monkeypatch.setattr("transformers.LlamaForCausalLM.get_output_embeddings", lambda _: None)
    record = execute_run(tiny("method=none", "head=8"))[0]
    assert record.error == "head=8: model=tiny has no output head that is a linear; use head=null"
