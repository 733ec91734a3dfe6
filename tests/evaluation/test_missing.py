"""Models that lack something: the run keeps what it measured, and a warning names what is absent and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from harness.config import MeasureConfig
from harness.evaluation import Assessment, missing, optional, perplexity
from harness.evaluation.latency import latency
from harness.evaluation.workload import Eager, random_tokens
from harness.nn import accepted, kvcache, one_line_errors
from harness.runs import execute_run
from tests.support.families import FAMILIES, build
from tests.support.reference import naive_perplexity

Tiny = Callable[..., dict[str, Any]]
WINDOWS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(1))
_STATE = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2}
_DECODER = {"vocab_size": 256, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4}
ODD: dict[str, dict[str, Any]] = {
    "mamba": {**_STATE, "state_size": 8},
    "rwkv": {**_STATE, "attention_hidden_size": 32, "intermediate_size": 64},
    "openai-gpt": {"vocab_size": 256, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
}
NESTED: dict[str, dict[str, Any]] = {
    "opt": FAMILIES["opt"] | {"vocab_size": 256},
    "bart": {**_DECODER, "encoder_layers": 2, "max_position_embeddings": 64},
    "trocr": {**_DECODER, "max_position_embeddings": 64},
}


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "cache"))


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    shape = AutoConfig.for_model(family, **(ODD | NESTED)[family])
    model: nn.Module = AutoModelForCausalLM.from_config(shape)
    return model.eval()


def raw_of(tiny: Tiny, family: str, *overrides: str) -> dict[str, Any]:
    raw = tiny(*overrides)
    raw["model"]["architecture"] = {"model_type": family, **(ODD | NESTED)[family]}
    return raw


@pytest.mark.parametrize("family", NESTED)
def test_a_body_inside_the_base_model_is_discovered(family: str) -> None:
    model = model_of(family)
    assert perplexity.scorer(model, WINDOWS).splits
    assert perplexity.perplexity(model, WINDOWS, 2).perplexity == pytest.approx(naive_perplexity(model, WINDOWS))


class Flat(nn.Module):
    """A model whose forward calls its embedding, a mixing layer, a norm and its head itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(128, 16), nn.GRU(16, 16, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 128)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.head(self.norm(self.mix(self.embed(input_ids))[0]))
        return type("Output", (), {"logits": logits})


def test_the_body_of_a_flat_model_ends_where_positions_are_independent() -> None:
    model = Flat().eval()
    scorer = perplexity.scorer(model, WINDOWS)
    assert scorer.splits
    assert scorer._tail is not None
    assert scorer._tail.modules == [model.norm], "not the embedding, whose tail mixes positions"
    expected = torch.stack([naive(model, window) for window in WINDOWS])
    assert perplexity.perplexity(model, WINDOWS, 3).window_nll == pytest.approx(expected.tolist())


def naive(model: nn.Module, window: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:])


@pytest.mark.parametrize("family", NESTED)
def test_runs_of_nested_models_have_a_divergence(tiny: Tiny, family: str) -> None:
    record = execute_run(raw_of(tiny, family, "method=none"))[0]
    assert record.status == "ok", record.error
    assert record.metrics["kl"] == 0


def test_logits_of_a_model_that_cannot_be_split_are_compared(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = execute_run(tiny("bits=3"))[0]
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(perplexity.Scorer, "_proved_tail", lambda *_: None)
    for options in (("method=none",), ("bits=3",)):
        record = execute_run(tiny(*options, "force=true"))[0]
        assert record.status == "ok", record.error
        assert record.warnings == split.warnings
    assert record.metrics["kl"] == pytest.approx(split.metrics["kl"], rel=1e-4)


@pytest.mark.parametrize("family", ODD)
def test_models_without_a_kv_cache_have_no_decode_metrics(tiny: Tiny, family: str) -> None:
    quick = ("measure=quick", "measure.prompt_len=8", "measure.repeats=1", "measure.decode_tokens=1")
    record = execute_run(raw_of(tiny, family, "method=none", *quick))[0]
    assert record.status == "ok", record.error
    assert {"perplexity", "kl", "prefill_ms_p50"} <= set(record.metrics)
    assert not {"decode_ms_p50", "kv_bytes_per_token", "kv_mib"} & set(record.metrics)
    name = type(model_of(family)).__name__
    for metric in ("decode latency", "kv_bytes_per_token"):
        assert f"measure: {name} returns no past_key_values; {metric} not measured" in record.warnings


def test_a_decode_that_fails_leaves_the_prefill(tiny: Tiny) -> None:
    model = build("llama")
    forward = model.forward

    def refuses(input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        if past_key_values is not None:
            raise NotImplementedError("no decode")
        return forward(input_ids=input_ids, use_cache=use_cache)

    model.forward = refuses
    cfg = MeasureConfig(prompt_len=4, warmup=1, decode_tokens=2, repeats=1)
    workload = Eager(model, *random_tokens(model, cfg, 0))
    result = latency((workload, workload), cfg)
    assert result.metrics["prefill_ms_p50"] > 0
    assert "decode_ms_p50" not in result.metrics
    assert result.warnings == ["measure: NotImplementedError: no decode; decode latency not measured"]


@pytest.mark.parametrize(
    ("name", "metrics", "kept"),
    [
        ("load_baseline", "divergence and latency", "perplexity"),
        ("diverge", "kl", "decode_ms_p50"),
        ("time", "latency", "kl"),
    ],
)
@pytest.mark.parametrize("error", [KeyError("odd"), MemoryError(), ValueError("word " * 99)])
def test_a_stage_that_fails_after_the_perplexity_leaves_the_record(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, metrics: str, kept: str, error: Exception
) -> None:
    def fail(_assessment: Assessment) -> None:
        raise error

    monkeypatch.setattr(Assessment, name, fail)
    record = execute_run(tiny("method=none", "measure=quick", "measure.prompt_len=8", "measure.repeats=1"))[0]
    assert record.status == "ok", record.error
    assert {"perplexity", kept} <= set(record.metrics)
    (warning,) = [each for each in record.warnings if f"; {metrics} not measured" in each]
    assert len(warning) <= 200
    assert warning.endswith("free memory and use force=true") == isinstance(error, MemoryError)


def test_no_memory_is_recognized_whatever_raises_it() -> None:
    allocator = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
    for error, short in [(MemoryError(), True), (allocator, True), (RuntimeError("shape"), False)]:
        warnings: list[str] = []
        with optional(warnings, "measure", "kl"):
            raise error
        assert warnings[0].endswith(missing._NO_MEMORY) == short


def test_the_traceback_of_a_missing_metric_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, count in (("", 0), ("1", 1)):
        monkeypatch.setenv("PTQBENCH_TRACEBACK", value)
        with optional([], "measure", "kl"):
            raise RuntimeError("shape")
        assert capsys.readouterr().err.count("Traceback") == count


def test_an_interruption_is_no_missing_metric() -> None:
    with pytest.raises(KeyboardInterrupt), optional([], "measure", "kl"):
        raise KeyboardInterrupt


def test_an_error_in_the_forward_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(perplexity, "last_states", fail)
    record = execute_run(tiny("method=none"))[0]
    assert record.status == "failed"
    assert record.error == (
        "data.seq_len=64: the forward of LlamaForCausalLM failed (index out of range in self); "
        "it has fewer positions or token ids, use a smaller data.seq_len"
    )


def test_too_little_memory_in_the_forward_has_its_own_remedy() -> None:
    message = r"failed \(MemoryError\); free memory, or use a smaller data.seq_len"
    with pytest.raises(ValueError, match=message), one_line_errors(build("llama"), "data.seq_len=64", "x"):
        raise MemoryError


@pytest.mark.parametrize(
    ("family", "shape", "usable"),
    [
        ("gpt2", {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}, 32),
        ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 48}, 48),
    ],
)
def test_windows_longer_than_the_positions_are_refused(
    tiny: Tiny, family: str, shape: dict[str, Any], usable: int
) -> None:
    raw = tiny("method=none")
    raw["model"]["architecture"] = {"model_type": family, "vocab_size": 256, **shape}
    error = str(execute_run(raw)[0].error)
    assert error == f"data.seq_len=64 exceeds the {usable} positions of model=tiny; use {usable} or less"


def test_experts_run_in_float64(tiny: Tiny) -> None:
    raw = tiny("method=none", "model.dtype=float64", "model.baseline_dtype=float64")
    raw["model"]["architecture"] = {"model_type": "mixtral", **FAMILIES["mixtral"], "vocab_size": 256}
    record = execute_run(raw)[0]
    assert record.status == "ok", record.error
    assert record.execution.dtype == "float64"


def test_a_long_error_is_cut_to_a_line() -> None:
    model = build("llama")
    message = r"^kv=x: the forward of LlamaForCausalLM failed \(word wo"
    with pytest.raises(ValueError, match=message) as caught, one_line_errors(model, "kv=x", "use kv=none"):
        raise RuntimeError("word\n" * 99)
    assert len(str(caught.value)) == 200
    assert str(caught.value).endswith("...); use kv=none")


def test_only_options_that_a_forward_accepts_are_passed() -> None:
    assert accepted(Flat(), use_cache=False) == {}
    assert accepted(build("llama"), use_cache=False, past_key_values=None) == {
        "use_cache": False,
        "past_key_values": None,
    }


def test_a_cache_of_another_class_has_no_known_size() -> None:
    assert kvcache.held_bytes(object()) is None
    with pytest.raises(ValueError, match="LlamaForCausalLM caches more than keys and values .object."):
        kvcache._checked(build("llama"), object())
