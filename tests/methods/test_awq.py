"""Compare AWQ's searches with a naive search over full outputs in float64; scaling must never raise the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import (
    AbsMean,
    Hessian,
    InputGroup,
    IntActivation,
    IntWeight,
    Producer,
    Scheme,
    Stats,
    round_to_nearest,
)
from harness.core.solvers.clip import clipped_params
from methods.awq import AWQ
from tests.support.blocks import GROUP8, TOKENS, Block, logits, relative
from tests.support.families import build, uneven
from tests.support.reference import naive_awq_search

SYMMETRIC = Scheme(name="test", weight=IntWeight(bits=3, symmetric=True, scale_dtype="float32"))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def block_of(family: str = "llama", scheme: Scheme = GROUP8) -> Block:
    return Block(uneven(build(family)).double(), scheme=scheme)


def stats_of(block: Block, group: InputGroup) -> Stats:
    return block.stats(group, [AbsMean, Hessian])


def transformed(block: Block, group: InputGroup, **options: Any) -> Tensor | None:
    stats = stats_of(block, group)
    block.search(group, stats)
    AWQ(**options).transform(group, stats)
    return group.scale


def output_of(block: Block, group: InputGroup) -> Callable[[list[Tensor]], Tensor]:
    """A function from weights to the output of the smallest module that contains a group of llama, written out."""
    inputs = block.inputs(group).double()
    if len(group.linears) == 1:
        return lambda weights: inputs @ weights[0].T
    down = block.model.get_parameter(block.prefix + "mlp.down_proj.weight")
    return lambda weights: (F.silu(inputs @ weights[0].T) * (inputs @ weights[1].T)) @ down.T


@pytest.mark.parametrize("scheme", [GROUP8, SYMMETRIC])
@pytest.mark.parametrize("member", ["o_proj", "up_proj", "down_proj"])
def test_the_search_finds_what_a_naive_one_finds(member: str, scheme: Scheme) -> None:
    block = block_of(scheme=scheme)
    group = block.group(member)
    assert group.producer is not None
    tied = group.producer.rows.tolist()
    expected, errors = naive_awq_search(
        block.inputs(group), list(group.weights.values()), scheme.weight, 10, output_of(block, group), tied
    )
    scale = transformed(block, group, ratios=10, exhaustive=True)
    assert scale is not None
    assert min(errors) < errors[0], "the test needs a case in which scaling is better than no scaling"
    assert relative(scale, expected) < 1e-5


@pytest.mark.parametrize("member", ["o_proj", "up_proj", "down_proj"])
def test_the_error_of_a_group_is_that_of_its_module(member: str) -> None:
    block = block_of()
    group = block.group(member)
    errors = naive_awq_search(
        block.inputs(group), list(group.weights.values()), GROUP8.weight, 4, output_of(block, group)
    )[1]
    magnitude = block.inputs(group).abs().mean(0)
    group.producer = None  # no channels share a scale
    block.search(group, stats_of(block, group))
    for k, error in enumerate(errors):
        scale = magnitude ** (k / 4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        assert group.error(scale) == pytest.approx(error, rel=1e-3)


def test_an_error_above_its_bound_is_measured_in_part() -> None:
    block = block_of()
    group = block.group("gate_proj")
    block.search(group, stats_of(block, group))
    scale = torch.linspace(0.5, 2, group.in_features)
    error = group.error(scale)
    assert group.error(scale, error) == group.error(scale, 2 * error) == error
    assert error / 4 < group.error(scale, error / 4) < error  # four sequences with similar errors


def test_an_attention_module_is_run_with_its_heads() -> None:
    block = block_of()
    group = block.groups[0]
    block.search(group, stats_of(block, group))
    attention = block.model.get_submodule(block.prefix + "self_attn")
    outputs: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _m, _a, output: outputs.append(output[0]))
    scale = torch.linspace(0.5, 2, 32).double()
    for states in block.stream.states:
        block.stream.run(states)
    for weight in group.weights.values():
        weight.copy_(round_to_nearest(weight * scale, GROUP8.weight).dequantize(torch.float64) / scale)
    for states in block.stream.states:
        block.stream.run(states)
    handle.remove()
    expected = float((torch.cat(outputs[:4]) - torch.cat(outputs[4:])).square().mean())
    fresh = block_of()
    fresh.search(fresh.groups[0], stats_of(fresh, fresh.groups[0]))
    assert fresh.groups[0].error(scale) == pytest.approx(expected, rel=1e-6)


def test_a_search_takes_as_many_whole_sequences_as_fit_evenly_spread() -> None:
    subset, expected = block_of(), Block(uneven(build("llama")).double(), tokens=TOKENS[[0, 2]])
    scale = torch.linspace(0.5, 2, 32).double()
    errors = []
    for block, tokens in ((subset, 47), (expected, 4096), (block_of(), 4096)):
        block.search(block.groups[0], stats_of(block, block.groups[0]), tokens)
        errors.append(block.groups[0].error(scale))
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)
    assert errors[0] != pytest.approx(errors[2], rel=1e-3)


def test_quantized_inputs_count_where_the_scheme_has_them() -> None:
    activation = IntActivation(bits=4, symmetric=True, grid="narrow", granularity="token")
    block = block_of(scheme=Scheme(name="test", weight=GROUP8.weight, activation=activation))
    group = block.group("down_proj")
    block.search(group, stats_of(block, group))
    scale = torch.linspace(0.5, 2, 64).double()
    (weight,) = group.weights.values()
    inputs = block.inputs(group) / scale
    step = inputs.abs().amax(1, keepdim=True) / 7
    quantized_inputs = (inputs / step).round().clamp(-8, 7) * step
    rounded = round_to_nearest(weight * scale, GROUP8.weight).dequantize(torch.float64)
    expected = (quantized_inputs @ rounded.T - block.inputs(group) @ weight.T).square().mean()
    assert group.error(scale) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_scaling_is_never_worse_than_rounding(family: str) -> None:
    scaled, unscaled = block_of(family), block_of(family)
    better = 0
    for group, unscaled_group in zip(scaled.groups, unscaled.groups, strict=True):
        if group.producer is None:
            continue
        scale = transformed(scaled, group, clip=False)
        assert scale is not None
        unscaled.search(unscaled_group, stats_of(unscaled, unscaled_group))
        identity = torch.ones_like(scale)
        assert unscaled_group.error(scale) <= unscaled_group.error(identity)
        better += unscaled_group.error(scale) < unscaled_group.error(identity)
        unscaled_group.rescale(scale)  # the same rescaling in both models, for the next group
    assert better


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "bloom"])
def test_the_function_stays_and_so_do_weights_while_searching(family: str) -> None:
    block = Block(uneven(build(family)))
    before = logits(block.model)
    for group in block.groups:
        block.search(group, stats_of(block, group))
        weights = {name: weight.clone() for name, weight in group.weights.items()}
        group.error(torch.linspace(0.5, 2, group.in_features))
        assert all(torch.equal(weight, weights[name]) for name, weight in group.weights.items())
        AWQ(ratios=5).transform(group, stats_of(block, group))
    assert any(group.scale is not None and (group.scale != 1).any() for group in block.groups)
    assert relative(logits(block.model), before) < 1e-4


@pytest.mark.parametrize("ratios", [2, 7, 12, 20, 24])
@pytest.mark.parametrize("best", [0.0, 0.3, 0.5, 0.77, 0.99])
def test_from_coarse_to_fine_it_finds_the_one_valley_with_fewer_trials(ratios: int, best: float) -> None:
    magnitude, tried_ratios = torch.linspace(0.1, 3, 16), list[float]()

    def error(scale: Tensor, _bound: float) -> float:  # the ratio follows from the spread of the scale
        tried_ratios.append(float((scale.max() / scale.min()).log() / (magnitude.max() / magnitude.min()).log()))
        return abs(tried_ratios[-1] - best)

    weight, gain = torch.randn(4, 16), torch.ones(16)
    group = InputGroup({}, {"x": weight}, producer=Producer("norm", "norm", gain, None, torch.arange(16)), trial=error)
    stats = Stats([AbsMean], 16)
    stats.update(magnitude[None])
    AWQ(ratios=ratios).transform(group, stats)
    assert group.scale is not None
    chosen = float((group.scale.max() / group.scale.min()).log() / (magnitude.max() / magnitude.min()).log())
    assert abs(chosen - best) == pytest.approx(min(abs(i / ratios - best) for i in range(ratios)), abs=1e-4)
    assert min(tried_ratios) == pytest.approx(0, abs=1e-6)  # the search always includes no scaling
    assert len(tried_ratios) == len(set(tried_ratios)) <= min(ratios, 6 + ratios // 4)
    assert torch.allclose(gain * group.scale, torch.ones(16))


def test_one_ratio_is_no_scaling() -> None:
    block = block_of()
    before = {name: value.clone() for name, value in block.model.state_dict().items()}
    for group in block.groups:
        scale = transformed(block, group, ratios=1)
        assert scale is not None
        assert torch.equal(scale, torch.ones_like(scale))
    assert all(torch.equal(value, before[name]) for name, value in block.model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "pairs", "scaled"),
    [
        ("llama", "all", [True, True, True, True]),
        ("llama", "paper", [True, False, True, True]),
        ("llama", "norms", [True, False, True, False]),
        ("gpt2", "all", [True, True, True, False]),
        ("gpt2", "paper", [True, True, True, False]),
        ("gpt2", "norms", [True, False, True, False]),
    ],
)
def test_pairs_choose_the_groups(family: str, pairs: str, scaled: list[bool]) -> None:
    block = block_of(family)
    assert [transformed(block, group, ratios=2, pairs=pairs) is not None for group in block.groups] == scaled


def test_each_search_can_be_left_out() -> None:
    block = block_of()
    group = block.group("o_proj")
    assert transformed(block, group, scale=False) is None
    assert not AWQ(scale=False).searches
    stats = stats_of(block, group)
    (weight,) = group.weights.values()
    unclipped, clipped = (AWQ(clip=on).quantize(weight, GROUP8, stats).dequantize() for on in (False, True))
    params = clipped_params(weight, GROUP8.weight, stats[Hessian].value)
    assert torch.equal(unclipped, round_to_nearest(weight, GROUP8.weight).dequantize())
    assert torch.equal(clipped, GROUP8.weight.quantized(weight, params).dequantize())
    assert not torch.equal(unclipped, clipped)


def test_a_search_that_was_not_announced_says_so() -> None:
    group = block_of().groups[0]
    with pytest.raises(ValueError, match="group.error needs the block's activations; have the method's `searches`"):
        group.error(torch.ones(32))


def test_an_error_that_is_no_number_is_refused() -> None:
    block = block_of()
    group = block.group("up_proj")
    block.search(group, stats_of(block, group))
    assert group.trial is not None
    block.model.get_parameter(block.prefix + "mlp.down_proj.weight")[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"gate_proj \+ .*up_proj: the output error of a trial scale is not finite"):
        group.error(torch.ones(32).double())


def test_no_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="^ratios=0 is out of range; expected 1 or more"):
        AWQ(ratios=0)
