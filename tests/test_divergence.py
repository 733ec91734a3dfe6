"""Divergence from the float model against naive float64 formulas, the states it keeps, and whole runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.evaluation import divergence, hidden_states, perplexity
from harness.models import Source
from harness.runs import execute_run
from harness.utils.disk_cache import DiskCache
from tests.families import build

Tiny = Callable[..., dict[str, Any]]
WINDOWS = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "cache"))


def noisy(model: nn.Module, size: float = 0.05) -> nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return other


def kept(model: nn.Module) -> tuple[perplexity.Scorer, list[Tensor]]:
    found: list[Tensor] = []
    perplexity.perplexity(model, WINDOWS, keep=found.append)
    return perplexity.scorer(model, WINDOWS), found


@torch.no_grad()
def naive(model: nn.Module, other: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """KL, top-1 and top-5 agreement of every scored position, from whole logits in float64."""
    kl, top1, top5 = [], [], []
    for window in WINDOWS:
        logits = [each.double()(input_ids=window[None]).logits[0, :-1] for each in (model, other)]
        p, q = (torch.softmax(each, -1) for each in logits)
        for i in range(len(p)):
            kl.append(sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p[i], q[i], strict=True)))
            ours, theirs = (set(each[i].topk(5).indices.tolist()) for each in logits)
            top1.append(float(logits[0][i].argmax() == logits[1][i].argmax()))
            top5.append(len(ours & theirs) / 5)
    return torch.tensor(kl), torch.tensor(top1), torch.tensor(top5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equals_the_formulas_token_by_token(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_LOGIT_ELEMENTS", 5 * 128)  # five positions at a time, 23 in all
    model = build(family)
    other = noisy(model)
    found = divergence.compare(kept(model), kept(other), WINDOWS)
    kl, top1, top5 = naive(model, other)
    assert len(found.kl) == WINDOWS.shape[0] * (WINDOWS.shape[1] - 1)
    torch.testing.assert_close(found.kl.float(), kl, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.top1.float(), top1)
    torch.testing.assert_close(found.top5.float(), top5)
    assert found.metrics["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.metrics["kl_median"] == pytest.approx(float(kl.median()), rel=1e-3)
    assert found.metrics["kl_median"] < found.metrics["kl_p99"] <= float(kl.max()) * 1.001
    assert found.window_kl == pytest.approx(kl.view(3, -1).mean(-1).tolist(), rel=1e-3)


def test_nll_is_the_perplexity_passs() -> None:
    model = build("llama")
    other = noisy(model)
    assert divergence.compare(kept(model), kept(other), WINDOWS).nll == perplexity.perplexity(other, WINDOWS).nll


def test_context_of_strided_windows_is_not_compared() -> None:
    model = build("llama")
    other = noisy(model)
    whole = divergence.compare(kept(model), kept(other), WINDOWS)
    found = divergence.compare(kept(model), kept(other), WINDOWS, unscored=15)
    assert torch.equal(found.kl.view(3, 8), whole.kl.view(3, 23)[:, 15:])
    assert found.nll == perplexity.perplexity(other, WINDOWS, unscored=15).nll


def test_a_strided_run_is_scored_and_compared_alike(tiny: Tiny) -> None:
    strided = ("data.protocol=strided", "data.stride=16")
    found = execute_run(tiny(*strided))[0]
    assert found.status == "ok", found.error
    assert found.data.protocol == "strided-64-16"
    assert found.metrics["kl"] > 0
    assert found.run_id != execute_run(tiny())[0].run_id


def test_a_model_does_not_diverge_from_itself() -> None:
    found = divergence.compare(kept(build("llama")), kept(build("llama")), WINDOWS)
    assert set(found.kl.tolist()) == {0.0}
    assert found.metrics["top1_agreement"] == found.metrics["top5_agreement"] == 1


def test_agreement_of_the_five_likeliest_counts_the_shared_ones() -> None:
    expected = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0, 0]])
    found = torch.tensor([[8.0, 9, 0, 0, 5, 7, 6, 0]])
    top1, top5 = divergence.agreement(expected, found)
    assert (float(top1), float(top5)) == (0.0, pytest.approx(3 / 5))


def test_logits_that_are_not_finite_are_refused() -> None:
    model = build("llama")
    scorer, found = kept(model)
    broken = [each.clone() for each in found]
    broken[1][3] = math.nan
    with pytest.raises(ValueError, match="divergence from the float model is not finite"):
        divergence.compare((scorer, found), (scorer, broken), WINDOWS)


def test_a_spool_gives_back_what_it_took_and_stops_at_its_limit(tmp_path: Path) -> None:
    given = [torch.randn(3, 4) for _ in range(4)]
    with hidden_states.spool(tmp_path, limit=3 * 48) as spooled:
        for each in given[:3]:
            spooled.append(each)
        assert all(torch.equal(a, b) for a, b in zip(spooled, given, strict=False))
        assert not spooled.refused
        spooled.append(given[3])
        assert "windows of states alone take" in spooled.refused
        assert len(spooled) == 3
    assert list(tmp_path.iterdir()) == []


def test_float_states_are_computed_once_and_forgotten_within_their_limit(tmp_path: Path) -> None:
    given = [torch.randn(3, 4) for _ in range(2)]
    computed: list[int] = []

    def compute(keep: Callable[[Tensor], None]) -> None:
        computed.append(1)
        for each in given:
            keep(each)

    def fill(limit: int, *decides: str) -> list[Tensor]:
        cache = DiskCache(tmp_path / "float", limit)
        with hidden_states.spool(tmp_path, limit=1000) as target:
            shared = hidden_states.FloatStates(cache, decides, len(given))
            shared.fill(target, compute)
            shared.publish(target, lambda states: 2 * states)
            return list(target)

    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(fill(1000, "a"), given, strict=True))
    assert len(computed) == 1
    fill(1000, "b")
    assert len(computed) == 2, "another stream is another"
    kept = hidden_states.FloatStates(DiskCache(tmp_path / "float", 1000), ["b"], len(given))
    assert kept.vouch_for(lambda states: states + states)
    assert not kept.vouch_for(lambda states: 2.001 * states), "another tail"
    assert not hidden_states.FloatStates(kept.cache, ["z"], len(given)).vouch_for(lambda states: 2 * states), (
        "none are kept"
    )
    fill(60, "c")  # room for one alone
    assert sum(path.stat().st_size for path in (tmp_path / "float").glob("*.safetensors")) < 60 + 200
    fill(60, "c")
    assert len(computed) == 4, "what was forgotten is computed again"


def test_runs_of_a_sweep_share_one_float_pass(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = perplexity.perplexity
    monkeypatch.setattr(perplexity, "perplexity", lambda *args: passes.append(1) or original(*args))
    first, second = (execute_run(tiny(f"bits={bits}"))[0] for bits in (4, 3))
    assert len(passes) == 3, "two of their own and one of the float model"
    assert 0 < first.metrics["kl"] < second.metrics["kl"]
    assert 0 < second.metrics["top5_agreement"] <= first.metrics["top5_agreement"] <= 1
    assert len(first.window_kl) == len(first.window_nll)
    assert first.metrics["kl"] == pytest.approx(sum(first.window_kl) / len(first.window_kl))
    baseline = execute_run(tiny("method=none"))[0]
    assert baseline.metrics["kl"] == 0
    assert set(first.stages) >= {"divergence"}


def test_a_float_run_leaves_its_states_to_others(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert execute_run(tiny("method=none"))[0].status == "ok"
    passes: list[int] = []
    original = perplexity.perplexity
    monkeypatch.setattr(perplexity, "perplexity", lambda *args: passes.append(1) or original(*args))
    assert execute_run(tiny("bits=3"))[0].metrics["kl"] > 0
    assert len(passes) == 1


def test_without_room_nothing_is_measured_and_the_record_says_so(tiny: Tiny) -> None:
    found = execute_run(tiny("measure.divergence_gib=0"))[0]
    assert found.status == "ok", found.error
    assert not {"kl", "top1_agreement"} & set(found.metrics)
    assert found.window_kl == []
    assert any("measure.divergence_gib=0 leaves no room for states" in warning for warning in found.warnings)
    off = execute_run(tiny("measure.divergence=false", "bits=3"))[0]
    assert "kl" not in off.metrics
    assert off.warnings == []


def test_room_does_not_change_which_run_it_is(tiny: Tiny) -> None:
    ids = {execute_run(tiny(f"measure.divergence_gib={room}"))[0].run_id for room in (4, 8)}
    assert len(ids) == 1


def test_a_rotated_model_is_compared_by_its_own_head(tiny: Tiny) -> None:
    turned = execute_run(tiny("method=rotate", "scheme=channel", "bits=8"))[0]
    assert turned.status == "ok", turned.error
    assert turned.metrics["kl"] < 1e-3


def test_the_float_model_is_loaded_only_where_its_tail_is_another(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    first = execute_run(tiny("bits=3"))[0]
    loads: list[int] = []
    original = Source.load
    monkeypatch.setattr(Source, "load", lambda *args: loads.append(1) or original(*args))
    again = execute_run(tiny("bits=3", "force=true"))[0]
    assert len(loads) == 1
    assert again.window_kl == first.window_kl
    assert execute_run(tiny("method=rotate", "scheme=channel", "bits=8"))[0].metrics["kl"] < 1e-3
    assert len(loads) == 3
