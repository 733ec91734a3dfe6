"""Divergence from the float model: equality with naive float64 formulas, the stored hidden states, and whole runs."""

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

from harness.evaluation import divergence, float_head, hidden_states, perplexity
from harness.models import Source
from harness.runs import execute_run
from harness.utils.disk_cache import DiskCache
from tests.support.families import build

Tiny = Callable[..., dict[str, Any]]
WINDOWS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "cache"))


def noisy(model: nn.Module, size: float = 0.05) -> nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return other


def scorer_and_states(model: nn.Module) -> tuple[perplexity.Scorer, list[Tensor]]:
    """The scorer of a model and its last hidden states of each window, as `divergence.compare` takes them."""
    states: list[Tensor] = []
    perplexity.perplexity(model, WINDOWS, keep=states.append)
    return perplexity.scorer(model, WINDOWS), states


@torch.no_grad()
def naive(model: nn.Module, other: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """KL, top-1 and top-5 agreement of each scored position, from all logits of a window in float64."""
    kl, top1, top5 = [], [], []
    for window in WINDOWS:
        logits = [each.double()(input_ids=window[None]).logits[0, :-1] for each in (model, other)]
        P, Q = (torch.softmax(each, -1) for each in logits)
        for i in range(len(P)):
            kl.append(sum(float(p) * (math.log(p) - math.log(q)) for p, q in zip(P[i], Q[i], strict=True)))
            top_P, top_Q = (set(each[i].topk(5).indices.tolist()) for each in logits)
            top1.append(float(logits[0][i].argmax() == logits[1][i].argmax()))
            top5.append(len(top_P & top_Q) / 5)
    return torch.tensor(kl), torch.tensor(top1), torch.tensor(top5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equals_the_formulas_token_by_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_LOGIT_ELEMENTS", 5 * 128)  # five positions at a time, 23 in all
    model = build(family)
    other = noisy(model)
    result = divergence.compare(scorer_and_states(model), scorer_and_states(other), WINDOWS)
    kl, top1, top5 = naive(model, other)
    assert len(result.kl) == WINDOWS.shape[0] * (WINDOWS.shape[1] - 1)
    torch.testing.assert_close(result.kl.float(), kl, rtol=1e-3, atol=1e-5)
    assert torch.equal(result.top1.float(), top1)
    torch.testing.assert_close(result.top5.float(), top5)
    assert result.metrics["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result.metrics["kl_median"] == pytest.approx(float(kl.median()), rel=1e-3)
    assert result.metrics["kl_median"] < result.metrics["kl_p99"] <= float(kl.max()) * 1.001
    assert result.window_kl == pytest.approx(kl.view(3, -1).mean(-1).tolist(), rel=1e-3)


def test_nll_equals_that_of_the_perplexity_pass() -> None:
    model = build("llama")
    other = noisy(model)
    result = divergence.compare(scorer_and_states(model), scorer_and_states(other), WINDOWS)
    assert result.window_nll == perplexity.perplexity(other, WINDOWS).window_nll


def test_context_of_strided_windows_is_not_compared() -> None:
    model = build("llama")
    other = noisy(model)
    whole = divergence.compare(scorer_and_states(model), scorer_and_states(other), WINDOWS)
    strided = divergence.compare(scorer_and_states(model), scorer_and_states(other), WINDOWS, unscored=15)
    assert torch.equal(strided.kl.view(3, 8), whole.kl.view(3, 23)[:, 15:])
    assert strided.window_nll == perplexity.perplexity(other, WINDOWS, unscored=15).window_nll


def test_a_strided_run_is_scored_and_compared(tiny: Tiny) -> None:
    strided = ("data.protocol=strided", "data.stride=16")
    record = execute_run(tiny(*strided))[0]
    assert record.status == "ok", record.error
    assert record.data.protocol == "strided-64-16"
    assert record.metrics["kl"] > 0
    assert record.run_id != execute_run(tiny())[0].run_id


def test_a_model_does_not_diverge_from_itself() -> None:
    result = divergence.compare(scorer_and_states(build("llama")), scorer_and_states(build("llama")), WINDOWS)
    assert set(result.kl.tolist()) == {0.0}
    assert result.metrics["top1_agreement"] == result.metrics["top5_agreement"] == 1


def test_agreement_of_the_five_likeliest_counts_the_shared_ones() -> None:
    reference = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0, 0]])
    quantized = torch.tensor([[8.0, 9, 0, 0, 5, 7, 6, 0]])
    top1, top5 = divergence.agreement(*map(float_head.likeliest, (reference, quantized)))
    assert (float(top1), float(top5)) == (0.0, pytest.approx(3 / 5))


def test_logits_that_are_not_finite_are_refused() -> None:
    model = build("llama")
    scorer, states = scorer_and_states(model)
    broken = [each.clone() for each in states]
    broken[1][3] = math.nan
    with pytest.raises(ValueError, match="divergence from the float model is not finite"):
        divergence.compare((scorer, states), (scorer, broken), WINDOWS)


def test_a_spool_returns_the_appended_tensors_and_stops_at_its_limit(tmp_path: Path) -> None:
    states = [torch.randn(3, 4) for _ in range(4)]
    with hidden_states.spool(tmp_path, limit=3 * 48) as spooled:
        for each in states[:3]:
            spooled.append(each)
        assert all(torch.equal(a, b) for a, b in zip(spooled, states, strict=False))
        assert not spooled.refused
        spooled.append(states[3])
        assert "windows of states take" in spooled.refused
        assert len(spooled) == 3
    assert list(tmp_path.iterdir()) == []


def test_float_states_are_computed_once_and_the_oldest_deleted_at_the_limit(tmp_path: Path) -> None:
    states = [torch.randn(3, 4) for _ in range(2)]
    computed: list[int] = []

    def compute(keep: Callable[[Tensor], None]) -> None:
        computed.append(1)
        for each in states:
            keep(each)

    def fill(limit: int, *decides: str) -> list[Tensor]:
        cache = DiskCache(tmp_path / "float", limit)
        with hidden_states.spool(tmp_path, limit=1000) as target:
            shared = hidden_states.FloatStates(cache, decides, len(states))
            shared.fill(target, compute)
            shared.publish(target, lambda hidden: 2 * hidden)
            return list(target)

    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(fill(1000, "a"), states, strict=True))
    assert len(computed) == 1
    fill(1000, "b")
    assert len(computed) == 2, "another stream has other states"
    stored = hidden_states.FloatStates(DiskCache(tmp_path / "float", 1000), ["b"], len(states))
    assert stored.vouch_for(lambda hidden: hidden + hidden)
    assert not stored.vouch_for(lambda hidden: 2.001 * hidden), "another tail"
    absent = hidden_states.FloatStates(stored.cache, ["z"], len(states))
    assert not absent.vouch_for(lambda hidden: 2 * hidden), "no states are stored"
    fill(60, "c")  # room for only one
    assert sum(path.stat().st_size for path in (tmp_path / "float").glob("*.safetensors")) < 60 + 200
    fill(60, "c")
    assert len(computed) == 4, "deleted states are computed again"


def test_runs_of_a_sweep_share_one_float_pass(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = perplexity.last_states
    monkeypatch.setattr(perplexity, "last_states", lambda *args: passes.append(1) or original(*args))
    first, second = (execute_run(tiny(f"bits={bits}"))[0] for bits in (4, 3))
    assert len(passes) == 3, "one of each quantized model and one of the float model"
    assert 0 < first.metrics["kl"] < second.metrics["kl"]
    assert 0 < second.metrics["top5_agreement"] <= first.metrics["top5_agreement"] <= 1
    assert len(first.window_kl) == len(first.window_nll)
    assert first.metrics["kl"] == pytest.approx(sum(first.window_kl) / len(first.window_kl))
    baseline = execute_run(tiny("method=none"))[0]
    assert baseline.metrics["kl"] == 0
    assert set(first.stages) >= {"divergence"}


def test_the_pass_with_divergence_gives_the_perplexity_of_one_without(tiny: Tiny) -> None:
    for options in (("bits=3",), ("bits=3", "data.protocol=strided", "data.stride=16"), ("method=none",)):
        alone, compared = (
            execute_run(tiny(*options, "force=true", f"measure.divergence={on}"))[0] for on in ("false", "true")
        )
        assert compared.status == "ok", compared.error
        assert compared.warnings == []
        assert compared.window_nll == alone.window_nll
        assert compared.metrics["perplexity"] == alone.metrics["perplexity"]


def test_each_head_runs_once_for_each_window(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from slices of one position, the check of the tail, and the first window, whose memory is measured."""
    rows: list[int] = []
    original = perplexity.Scorer.tail
    monkeypatch.setattr(
        perplexity.Scorer, "tail", lambda self, states: rows.append(len(states)) or original(self, states)
    )
    execute_run(tiny("method=none"))
    assert rows.count(63) == 2, "the float model alone: two windows"
    rows.clear()
    execute_run(tiny("bits=3"))
    assert rows.count(63) == 1 + 2 * 2, "the first window, and both models in the divergence pass"


def test_the_float_head_runs_once_for_all_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later runs read its predictions, to the bit; if these do not fit beside the states, each run computes them."""
    states = 2 * 64 * 64 * 4  # of two windows, in bytes
    too_small = f"measure.divergence_gib={(states + 2 * 63 * 256 * 4 - 1) / 2**30}"
    rows: list[int] = []
    original = float_head.Expected.of
    monkeypatch.setattr(
        float_head.Expected, "of", classmethod(lambda _, logits: rows.append(len(logits)) or original(logits))
    )
    computed = execute_run(tiny("bits=3", too_small))[0]
    assert execute_run(tiny("bits=4", too_small))[0].status == "ok"
    assert rows == [63] * 4, "nothing is stored: both windows in both runs"
    first = execute_run(tiny("bits=3", "force=true"))[0]
    read = execute_run(tiny("bits=3", "force=true"))[0]
    assert rows == [63] * 6, "the second of these runs reads both windows"
    kept = [(run.window_kl, run.window_nll, run.metrics["top5_agreement"]) for run in (computed, first, read)]
    assert kept[0] == kept[1] == kept[2]


def test_predictions_of_another_stride_are_others(tiny: Tiny) -> None:
    def divergence_at(stride: int, *options: str) -> list[float]:
        one_window = ("data.protocol=strided", "data.max_windows=1")  # it has the same tokens at any stride
        return execute_run(tiny(*one_window, f"data.stride={stride}", "bits=3", *options))[0].window_kl

    alone = divergence_at(32, "measure.divergence_gib=3e-5")  # room for states alone: nothing else is stored
    assert len(alone) > 0
    divergence_at(16)
    assert divergence_at(32, "force=true") == alone


def test_a_pass_that_disagrees_leaves_the_perplexity(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = execute_run(tiny("bits=3", "measure.divergence=false"))[0]
    original = divergence.compare

    def wrong(*args: Any) -> divergence.Divergence:
        result = original(*args)
        return replace(result, window_nll=[nll + 1e-3 for nll in result.window_nll])

    monkeypatch.setattr(divergence, "compare", wrong)
    record = execute_run(tiny("bits=3"))[0]
    assert record.status == "ok", record.error
    assert record.window_nll == alone.window_nll
    assert record.window_kl == []
    (warning,) = record.warnings
    assert warning.startswith("divergence: nll=")
    assert warning.endswith("; kl not measured")


def test_logits_that_are_not_finite_after_the_first_window_fail_the_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = perplexity.last_states

    def broken(*args: Any) -> Any:
        for i, (states, tokens) in enumerate(original(*args)):
            yield states * (math.nan if i else 1), tokens

    monkeypatch.setattr(perplexity, "last_states", broken)
    record = execute_run(tiny("bits=3"))[0]
    assert record.error == "perplexity is not finite: window 1 has NaN or infinite logits"


def test_a_float_run_stores_its_states_for_other_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert execute_run(tiny("method=none"))[0].status == "ok"
    passes: list[int] = []
    original = perplexity.last_states
    monkeypatch.setattr(perplexity, "last_states", lambda *args: passes.append(1) or original(*args))
    assert execute_run(tiny("bits=3"))[0].metrics["kl"] > 0
    assert len(passes) == 1


def test_without_disk_space_nothing_is_measured_and_the_record_warns(tiny: Tiny) -> None:
    record = execute_run(tiny("measure.divergence_gib=0"))[0]
    assert record.status == "ok", record.error
    assert not {"kl", "top1_agreement"} & set(record.metrics)
    assert record.window_kl == []
    assert any("measure.divergence_gib=0: hidden states cannot be stored" in warning for warning in record.warnings)
    off = execute_run(tiny("measure.divergence=false", "bits=3"))[0]
    assert "kl" not in off.metrics
    assert off.warnings == []


def test_the_disk_limit_does_not_change_the_run_id(tiny: Tiny) -> None:
    ids = {execute_run(tiny(f"measure.divergence_gib={limit}"))[0].run_id for limit in (4, 8)}
    assert len(ids) == 1


def test_a_rotated_model_is_compared_with_its_rotated_head(tiny: Tiny) -> None:
    rotated = execute_run(tiny("method=rotate", "scheme=channel", "bits=8"))[0]
    assert rotated.status == "ok", rotated.error
    assert rotated.metrics["kl"] < 1e-3


def test_the_float_model_is_loaded_only_if_its_tail_differs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    first = execute_run(tiny("bits=3"))[0]
    loads: list[int] = []
    original = Source.load
    monkeypatch.setattr(Source, "load", lambda *args: loads.append(1) or original(*args))
    again = execute_run(tiny("bits=3", "force=true"))[0]
    assert len(loads) == 1
    assert again.window_kl == first.window_kl
    assert execute_run(tiny("method=rotate", "scheme=channel", "bits=8"))[0].metrics["kl"] < 1e-3
    assert len(loads) == 3
