"""Bit allocation, compared with all possible allocations, and runs with a different width for each linear."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from harness import data, models
from harness.config import RunConfig, build_run
from harness.core import QTensor, round_to_nearest
from harness.models import Decoder, weight_of
from harness.nn import QuantLinear
from harness.quantization import mixed
from harness.quantization.allocation import Choice, allocate, hull
from harness.records import Analysis, Record, Weights, store
from harness.reports import label, to_frame
from harness.runs import execute_run
from harness.utils.disk_cache import DiskCache
from tests.conftest import TINY, resolve, run_id_of
from tests.support.blocks import GROUP8, Block, relative
from tests.support.decoders import linears, quantize
from tests.support.families import build, uneven

Tiny = Callable[..., dict[str, Any]]
WIDTHS = (2, 3, 4, 5, 6, 8)
NO_CACHE = DiskCache(Path(), 0)


def source_of(cfg: RunConfig) -> Record:
    """The record of sensitivities that a configuration uses."""
    return mixed.source(cfg, models.open(cfg.model, cfg.seed).fingerprint)


def plan(model: nn.Module, cfg: RunConfig, tokens: Tensor) -> mixed.Plan:
    return mixed.plan(Decoder(model), cfg, source_of(cfg), tokens, NO_CACHE)


choices = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=4, unique_by=lambda pair: pair[0]
).map(lambda pairs: [Choice(i, stored, cost) for i, (stored, cost) in enumerate(pairs)])
curves = st.lists(choices, min_size=1, max_size=4).map(lambda drawn: {f"linear{i}": c for i, c in enumerate(drawn)})


def least(curves: dict[str, list[Choice]], budget: float) -> float:
    """The lowest cost of all allocations that fit the budget."""
    fitting = [each for each in itertools.product(*curves.values()) if sum(c.stored for c in each) <= budget]
    return min(sum(choice.cost for choice in each) for each in fitting)


@given(curves, st.floats(0, 1))
def test_no_allocation_in_the_budget_costs_less_by_more_than_one_step(
    curves: dict[str, list[Choice]], share: float
) -> None:
    low, high = (sum(f(c.stored for c in curve) for curve in curves.values()) for f in (min, max))
    budget = low + share * (high - low)
    chosen = allocate(curves, budget)
    assert chosen.keys() == curves.keys()
    assert all(chosen[name] in curve for name, curve in curves.items())
    assert sum(choice.stored for choice in chosen.values()) <= budget
    cost, best = sum(choice.cost for choice in chosen.values()), least(curves, budget)
    steps = [a.cost - b.cost for curve in curves.values() for a, b in itertools.pairwise(hull(curve))]
    assert cost <= best + max(steps, default=0.0) + 1e-9


@given(curves)
def test_allocations_on_the_hull_of_the_sum_are_optimal(curves: dict[str, list[Choice]]) -> None:
    steps = [
        ((a.cost - b.cost) / (b.stored - a.stored), b.stored - a.stored)
        for curve in curves.values()
        for a, b in itertools.pairwise(hull(curve))
    ]
    spent = float(sum(min(choice.stored for choice in curve) for curve in curves.values()))
    for _, added in [(0.0, 0), *sorted(steps, reverse=True)]:
        spent += added
        chosen = allocate(curves, spent)
        assert sum(choice.cost for choice in chosen.values()) == pytest.approx(least(curves, spent), abs=1e-9)


def test_the_hull_by_hand() -> None:
    curve = [Choice(bits, 10 * bits, cost) for bits, cost in ((2, 8.0), (3, 6.0), (4, 2.0), (5, 2.5), (6, 1.0))]
    assert [choice.bits for choice in hull(curve)] == [2, 4, 6], "3 is above the line from 2 to 4, 5 is worse than 4"


def test_a_budget_below_the_narrowest_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="budget=29.9 is below the 30 bits that the narrowest widths take; raise it"):
        allocate({"a": [Choice(3, 30, 1.0)]}, 29.9)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> store.Record:
    """The record of a sensitivity run of the tiny model."""
    folder = tmp_path_factory.mktemp("measured")
    options = ("bits=3", "analysis.sensitivity=linear", "execution=simulated", "measure=off", f"results_dir={folder}")
    return execute_run(resolve(*TINY, *options))[0]


@pytest.fixture
def sensitivity_path(measured: store.Record, tmp_path: Path) -> Path:
    """The path of this record, with sensitivities that differ between linears by far more than noise."""
    record = copy.deepcopy(measured)
    assert record.status == "ok", record.error
    for i, row in enumerate(record.analysis.sensitivity):
        row["kl_alone"] = 0.001 * 4 ** (i % 5)
    return store.write(record, tmp_path / "sensitivities")


def mixing(tiny: Tiny, sensitivity_path: Path, *options: str, budget: float = 4.0) -> dict[str, Any]:
    return tiny(f"mixed.budget={budget}", f"mixed.sensitivity={sensitivity_path}", "execution=simulated", *options)


def float_model(cfg: RunConfig) -> nn.Module:
    return models.open(cfg.model, cfg.seed).load(torch.float32, torch.device("cpu"))


def calibration(cfg: RunConfig) -> Tensor:
    return data.calibration(cfg.data, models.open(cfg.model, cfg.seed).tokenizer, cfg.seed).windows


def inputs_of(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    inputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return torch.cat(inputs)


@pytest.mark.parametrize("by", ["linear", "block"])
def test_a_plan_costs_as_much_as_its_formula(tiny: Tiny, sensitivity_path: Path, by: str, tmp_path: Path) -> None:
    source = store.read(sensitivity_path)
    measured = {row["name"]: row["kl_alone"] for row in source.analysis.sensitivity}
    if by == "block":
        rows = source.analysis.sensitivity
        rows[:] = [rows[0] | {"name": "model.layers.0"}, rows[3] | {"name": "model.layers.1"}]
        measured = {row["name"]: row["kl_alone"] for row in rows}
        sensitivity_path = store.write(source, tmp_path / "blocks")
    cfg = build_run(mixing(tiny, sensitivity_path))
    assert cfg.scheme is not None
    model, tokens = float_model(cfg), calibration(cfg)
    chosen = plan(model, cfg, tokens)
    cost, bits, weights = 0.0, 0.0, 0
    for unit, kl in measured.items():
        members = [name for name in linears(model) if name == unit or name.startswith(f"{unit}.")]
        squared = {3: 0.0, chosen.bits[members[0]]: 0.0}
        for name in members:
            weight, x = weight_of(model.get_submodule(name)), inputs_of(model, name, tokens)
            assert chosen.bits[name] == chosen.bits[members[0]]
            for width in squared:
                rounded = round_to_nearest(weight, cfg.scheme.at(width).weight)
                squared[width] += relative(x @ rounded.dequantize().T, x @ weight.T) ** 2
            bits += cfg.scheme.at(chosen.bits[name]).weight.bits_per_weight(tuple(weight.shape)) * weight.numel()
            weights += weight.numel()
        cost += kl * squared[chosen.bits[members[0]]] / squared[3]
    assert chosen.predicted_kl == pytest.approx(cost, rel=1e-3)
    assert chosen.bits_per_weight == pytest.approx(bits / weights)
    assert chosen.bits_per_weight <= 4
    assert len(set(chosen.bits.values())) > 1
    assert chosen.warnings == []
    assert chosen.predicted_kl < min(chosen.uniform_kl.values())
    assert list(chosen.uniform_kl) == [2, 3], "four bits and their scales take more than the budget"


def test_sensitive_linears_get_more_bits(tiny: Tiny, sensitivity_path: Path) -> None:
    source = store.read(sensitivity_path)
    for row in source.analysis.sensitivity:
        row["kl_alone"] = 1.0 if row["name"].endswith("gate_proj") else 1e-3
    store.write(source, sensitivity_path.parent)
    cfg = build_run(mixing(tiny, sensitivity_path))
    bits = plan(float_model(cfg), cfg, calibration(cfg)).bits
    gates = [width for name, width in bits.items() if name.endswith("gate_proj")]
    others = [width for name, width in bits.items() if not name.endswith("gate_proj")]
    assert min(gates) > max(others)


def by_hand(cfg: RunConfig, widths: dict[str, int]) -> dict[str, Tensor]:
    """Decoded weights of a run with float propagation, computed block by block, each linear at its width."""
    model, tokens, decoded = float_model(cfg), calibration(cfg), dict[str, Tensor]()
    (step,) = cfg.steps.values()
    assert cfg.scheme is not None
    with torch.no_grad():
        for index in range(2):
            block = Block(model, index, cfg.scheme, tokens)
            stats = [block.stats(group, step.needs) for group in block.groups]
            for group, group_stats in zip(block.groups, stats, strict=True):
                group.schemes = {name: cfg.scheme.at(widths[name]) for name in group.linears}
                if step.searches:
                    block.search(group, group_stats, cfg.engine.search_tokens)
                step.transform(group, group_stats)
            for group in block.groups:
                group_stats = block.stats(group, step.needs)
                for name, weight in group.weights.items():
                    qtensor = step.quantize(weight.clone(), cfg.scheme.at(widths[name]), group_stats)
                    decoded[name] = qtensor.dequantize()
    return decoded


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_a_mixed_run_quantizes_each_linear_at_its_width(tiny: Tiny, method: str, sensitivity_path: Path) -> None:
    cfg = build_run(mixing(tiny, sensitivity_path, f"method={method}", "engine.propagate=float"))
    model, tokens = float_model(cfg), calibration(cfg)
    widths = {name: WIDTHS[i % 4] for i, name in enumerate(linears(model))}
    result = quantize(model, cfg, tokens, widths=widths)
    expected = by_hand(cfg, widths)
    assert {row["name"]: row["bits"] for row in result.layers} == widths
    for row in result.layers:
        linear = model.get_submodule(row["name"])
        assert isinstance(linear, QuantLinear)
        assert linear.decoded is not None
        assert relative(linear.decoded, expected[row["name"]]) < 1e-3, row["name"]
        assert cfg.scheme is not None
        analytic = cfg.scheme.at(row["bits"]).weight.bits_per_weight(tuple(row["shape"]))
        assert row["bits_per_weight"] == pytest.approx(analytic)


def test_a_trial_rounds_each_linear_of_a_group_to_its_width() -> None:
    block = Block(uneven(build("llama")), scheme=GROUP8)
    group = block.group("gate_proj")
    names = list(group.linears)
    group.schemes = {names[1]: GROUP8.at(8)}
    block.search(group, block.stats(group, ()))
    with torch.no_grad():
        x, mlp = block.inputs(group), block.model.get_submodule(f"{block.prefix}mlp")
        rounded = copy.deepcopy(mlp)
        for name, bits in zip(names, (3, 8), strict=True):
            weight = weight_of(rounded.get_submodule(name.rpartition(".")[2]))
            weight.copy_(GROUP8.at(bits).weight.snap_weight(weight))
        expected = float((rounded(x) - mlp(x)).square().mean())
        error = group.error(torch.ones(32))
    assert error == pytest.approx(expected, rel=1e-3)
    assert group.scheme_of(names[0]) is GROUP8


@pytest.mark.parametrize("method", ["rtn", "awq", "rotate_gptq"])
def test_a_whole_run(tiny: Tiny, method: str, sensitivity_path: Path) -> None:
    record, _ = execute_run(mixing(tiny, sensitivity_path, f"method={method}"))
    assert record.status == "ok", record.error
    plan = record.analysis.mixed
    assert plan["sensitivity"] == store.read(sensitivity_path).run_id
    assert record.metrics["bits_per_weight"] == pytest.approx(plan["bits_per_weight"])
    assert 3.5 < plan["bits_per_weight"] <= 4
    assert len({row["bits"] for row in record.layers}) > 1
    assert record.options["mixed.budget"] == 4.0
    assert "mixed.sensitivity" not in record.options
    assert "group64 mixed.budget=4.0" in label(record)
    (row,) = to_frame([record]).to_dict("records")
    assert "mixed.budget=4.0" in row["options"]
    assert row["bits"] != row["bits"], "nan, because the run has several widths"
    assert record.stages["allocate"] > 0


def test_sensitivities_and_not_their_file_decide_the_run(tiny: Tiny, sensitivity_path: Path) -> None:
    def identity(path: Path, *options: str) -> str:
        raw = mixing(tiny, path, *options)
        return run_id_of(raw)

    first = identity(sensitivity_path)
    assert identity(sensitivity_path.parent) == first, "the newest record of the folder"
    assert identity(sensitivity_path, "bits=3") == first, "the width of the scheme has no effect"
    assert identity(sensitivity_path, "mixed.widths=[2,4]") != first
    source = store.read(sensitivity_path)
    source.analysis.sensitivity[0]["kl_alone"] *= 2
    changed = store.write(source, sensitivity_path.parent)
    assert identity(changed) != first
    plain = tiny("mixed.widths=[2,4]")
    assert run_id_of(plain) == run_id_of(tiny()), "without a budget, widths have no effect"


def test_the_newest_usable_record_of_a_folder_is_used(tiny: Tiny, sensitivity_path: Path) -> None:
    usable = store.read(sensitivity_path)
    unusable = {
        "failed": replace(usable, status="failed"),
        "none": replace(usable, analysis=Analysis()),
        "model": replace(usable, model=Weights(fingerprint="other")),
        "mixed": replace(usable, analysis=replace(usable.analysis, mixed={"bits": {}})),
    }
    for name, record in unusable.items():
        store.write(replace(record, run_id=name), sensitivity_path.parent)
    (sensitivity_path.parent / "broken.json").write_text("{")
    assert source_of(build_run(mixing(tiny, sensitivity_path.parent))).run_id == usable.run_id
    sensitivity_path.unlink()
    with pytest.raises(ValueError, match="holds no finished run with sensitivities of model=tiny at one width; run"):
        source_of(build_run(mixing(tiny, sensitivity_path.parent)))


def test_linears_without_a_meaningful_sensitivity(tiny: Tiny, sensitivity_path: Path) -> None:
    source = store.read(sensitivity_path)
    rows = source.analysis.sensitivity
    rows[0]["kl_alone"], rows[1]["kl_alone"] = 0.0, -1e-9
    store.write(source, sensitivity_path.parent)
    cfg = build_run(mixing(tiny, sensitivity_path))
    chosen = plan(float_model(cfg), cfg, calibration(cfg))
    (note,) = chosen.warnings
    assert note == f"mixed: the KL of {rows[0]['name']} and 1 more is within rounding noise; 1e-07 nats are assumed"
    assert chosen.bits[rows[0]["name"]] == 2

    model = float_model(cfg)
    exact = weight_of(model.get_submodule(rows[4]["name"]))
    assert cfg.scheme is not None
    with torch.no_grad():
        exact.copy_(round_to_nearest(exact, cfg.scheme.at(3).weight).dequantize())
    (_, note) = plan(model, cfg, calibration(cfg)).warnings
    assert note == f"mixed: {rows[4]['name']} had no error at 3 bits; the median sensitivity is assumed"


def test_another_scheme_is_a_warning_and_a_linear_without_sensitivity_an_error(
    tiny: Tiny, sensitivity_path: Path
) -> None:
    cfg = build_run(mixing(tiny, sensitivity_path, "scheme=group32"))
    (note,) = plan(float_model(cfg), cfg, calibration(cfg)).warnings
    assert note.endswith("measured sensitivities under another scheme (group_size)")
    source = store.read(sensitivity_path)
    del source.analysis.sensitivity[3]
    store.write(source, sensitivity_path.parent)
    record, _ = execute_run(mixing(tiny, sensitivity_path))
    assert record.error is not None
    assert f"run {source.run_id} has no sensitivity of model.layers.0.self_attn.o_proj; measure it with" in record.error


class Wasteful(QTensor):
    """A weight that stores each value as float16, more than the scheme stores."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.register_buffer("values", weight.half())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values.to(dtype)  # type: ignore[operator,no-any-return]


def test_a_method_that_exceeds_the_budget_gets_a_warning(
    tiny: Tiny, sensitivity_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("methods.rtn.RTN.quantize", lambda _self, weight, _scheme, _stats: Wasteful(weight))
    record, _ = execute_run(mixing(tiny, sensitivity_path))
    assert record.status == "ok", record.error
    assert "mixed.budget=4 is exceeded: the method stores 16 bits per weight, scales included" in record.warnings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mixed.budget=2"], "mixed.budget=2 is below the 2.281 bits per weight that the narrowest of mixed.widths="),
        (["mixed.widths=[2,2]"], r"mixed.widths=\[2, 2\] cannot be chosen from; expected different widths of 2 to 8"),
        (["mixed.widths=[1]"], r"mixed.widths=\[1\] cannot be chosen from"),
        (
            ["mixed.sensitivity=null"],
            "mixed.sensitivity=None with budget=4: nothing says which linears need more bits;",
        ),
        (["mixed.sensitivity=nowhere"], "nowhere is not a record"),
        (["method=aqlm", "scheme=none"], "mixed.budget=4 with scheme=none: method=aqlm has codes of its own"),
        (["method=nf4", "scheme=nf4"], "method.nf4: bits=2 does not match table=nf4; expected bits=4"),
        (["save=x", "export=awq"], "export=awq with mixed.budget=4: the file has one width for all linears; expected"),
    ],
)
def test_configurations_that_cannot_be_mixed_are_refused(
    tiny: Tiny, sensitivity_path: Path, options: list[str], message: str
) -> None:
    record, _ = execute_run(mixing(tiny, sensitivity_path, *options))
    assert record.status == "failed"
    with pytest.raises(ValueError, match=message):
        raise ValueError(record.error)
