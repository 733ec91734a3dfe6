"""Perplexity equals a naive loop, for any batch size, slice of logits and dtype."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from harness.evaluation import perplexity as perplexity_module
from harness.evaluation.perplexity import Perplexity, perplexity
from tests.support.families import build
from tests.support.reference import naive_perplexity

WINDOWS = torch.randint(3, 128, (5, 24), generator=torch.Generator().manual_seed(1))


def test_equals_the_naive_loop() -> None:
    model = build("llama")
    assert perplexity(model, WINDOWS).perplexity == pytest.approx(naive_perplexity(model, WINDOWS), rel=1e-6)


@torch.no_grad()
def test_strided_windows_score_each_target_once_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers' guide to perplexity: the loss leaves out the labels of the context."""
    model, text, seq_len, stride = build("llama"), WINDOWS.flatten(), 24, 8
    windows = text.unfold(0, seq_len, stride)
    monkeypatch.setattr(perplexity_module, "_LOGIT_ELEMENTS", 3 * 128)
    losses, targets = [], []
    for start in range(0, len(text) - seq_len + 1, stride):
        labels = text[start : start + seq_len].clone()
        targets += range(start + seq_len - stride, start + seq_len)
        labels[:-stride] = -100
        logits = model(input_ids=text[None, start : start + seq_len]).logits[0]
        losses.append(float(nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)))
    strided = perplexity(model, windows, unscored=seq_len - 1 - stride)
    assert strided.window_nll == pytest.approx(losses, rel=1e-5)
    assert targets == list(range(seq_len - stride, len(text))), "each target is scored once"


def test_does_not_depend_on_batch_size_or_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3")
    expected = perplexity(model, WINDOWS).window_nll
    for batch_size in (2, 5, 100):
        assert perplexity(model, WINDOWS, batch_size).window_nll == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(perplexity_module, "_LOGIT_ELEMENTS", 3 * 128)  # three positions at a time
    assert perplexity(model, WINDOWS).window_nll == pytest.approx(expected, rel=1e-6)


def test_capped_logits_are_capped_and_still_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2")
    model.lm_head.weight.data *= 100  # far above the cap of 5  # type: ignore[union-attr,operator]
    expected = naive_perplexity(model, WINDOWS)
    monkeypatch.setattr(perplexity_module, "_LOGIT_ELEMENTS", 3 * 128)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _args, out: rows.append(out.shape[1]))
    assert perplexity(model, WINDOWS).perplexity == pytest.approx(expected, rel=1e-5)
    assert max(rows[3:]) <= 3, "only slices, after the check that computes the logits of a probe three times"
    assert set(rows[3:]) == {1, 2, 3}


class Unusual(nn.Module):
    """A model whose forward uses the tokens after the body, so that it cannot be split."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama")
        self.base_model = self.inner.model

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = self.inner.lm_head(self.base_model(input_ids=input_ids)[0])  # type: ignore[operator]
        return SimpleNamespace(logits=logits * (1 + input_ids[..., None] / 64))


def test_a_model_that_cannot_be_split_runs_whole() -> None:
    model = Unusual()
    assert perplexity(model, WINDOWS, 3).perplexity == pytest.approx(naive_perplexity(model, WINDOWS), rel=1e-5)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    model = build("llama").to(torch.bfloat16)
    assert perplexity(model, WINDOWS).perplexity == pytest.approx(naive_perplexity(model, WINDOWS), rel=1e-5)


def test_the_mean_is_over_windows_and_an_overflow_gives_none() -> None:
    assert Perplexity([1.0, 3.0]).perplexity == pytest.approx(math.exp(2))
    assert Perplexity([800.0]).perplexity is None


def test_nan_logits_are_refused() -> None:
    model = build("llama")
    model.lm_head.weight.data[7] = math.nan  # type: ignore[union-attr,operator,index]
    with pytest.raises(ValueError, match="perplexity is not finite: window 0"):
        perplexity(model, WINDOWS)
