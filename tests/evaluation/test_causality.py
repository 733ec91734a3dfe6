"""The warning for a model that looks ahead: encoders get it, causal models of every family do not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.evaluation import warn_of_lookahead
from harness.evaluation.causality import looks_ahead
from harness.runs import execute_run
from tests.support.families import FAMILIES, build

Tiny = Callable[..., dict[str, Any]]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _bert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "bert", {"vocab_size": 128, **BERT, "initializer_range": 0.5})


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_encoder_looks_ahead_and_the_same_model_as_decoder_does_not(dtype: torch.dtype) -> None:
    assert looks_ahead(build("bert").to(dtype))
    assert not looks_ahead(build("bert", is_decoder=True).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom"])
def test_rounding_is_no_lookahead(family: str, dtype: torch.dtype) -> None:
    assert not looks_ahead(build(family).to(dtype))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_causal_families_do_not_look_ahead(family: str) -> None:
    assert not looks_ahead(build(family))


class Leaky(nn.Module):
    """Logits of each token, with a part `leak` of those of the last token, and noise if `noisy`."""

    def __init__(self, leak: float = 0.0, noisy: bool = False) -> None:
        super().__init__()
        self.embed, self.leak, self.noisy = nn.Embedding(128, 128), leak, noisy

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        values = self.embed(input_ids)
        values = values + self.leak * values[:, -1:]
        return SimpleNamespace(logits=values + torch.randn_like(values) if self.noisy else values)


def test_a_part_of_a_thousandth_is_more_than_rounding() -> None:
    assert looks_ahead(Leaky(1e-3))
    assert not looks_ahead(Leaky(1e-6))


def test_nothing_is_said_about_a_model_that_repeats_no_logits_or_does_not_run() -> None:
    assert not looks_ahead(Leaky(1.0, noisy=True))
    assert not looks_ahead(nn.Linear(2, 2))


def test_a_run_of_an_encoder_is_ok_with_a_warning(tiny: Tiny) -> None:
    raw = tiny("method=none")
    raw["model"]["architecture"] = {"model_type": "bert", "vocab_size": 256, **BERT, "is_decoder": False}
    record = execute_run(raw)[0]
    assert record.status == "ok", record.error
    assert record.warnings[0] == (
        "model=tiny: its logits depend on later tokens, as in an encoder, so perplexity is too low; "
        "expected a decoder, set is_decoder=true in config.json"
    )
    raw["model"]["architecture"]["is_decoder"] = True
    decoder = execute_run(raw)[0]
    assert decoder.status == "ok", decoder.error
    assert not any("later tokens" in warning for warning in decoder.warnings)


def test_a_model_that_is_only_timed_is_not_checked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runs.run.warn_of_lookahead", lambda *_arguments: ["checked"])
    assert execute_run(tiny("method=none"))[0].warnings == ["checked"]
    timed = execute_run(tiny("method=none", "model.scored=false", "measure.latency=true", "measure.prompt_len=8"))[0]
    assert timed.status == "ok", timed.error
    assert "checked" not in timed.warnings


def test_a_long_name_is_shortened_and_the_remedy_is_that_of_the_config() -> None:
    (line,) = warn_of_lookahead(Leaky(1.0), "name" * 99)
    assert len(line) <= 200
    assert line.endswith("; expected a decoder")
    (line,) = warn_of_lookahead(build("bert"), "name" * 99)
    assert len(line) <= 200
    assert line.endswith("; expected a decoder, set is_decoder=true in config.json")
