"""Compare SmoothQuant with equation 4, one channel at a time; the search must never raise the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import build_run
from harness.core import InputGroup, IntActivation, IntWeight, MinMax, Scheme
from methods.smoothquant import SmoothQuant
from tests.support.blocks import TOKENS, Block, logits, relative
from tests.support.decoders import quantize
from tests.support.families import build, uneven
from tests.support.reference import naive_smoothquant_scale

W8A8 = Scheme(
    name="test",
    weight=IntWeight(bits=8, symmetric=True, grid="narrow"),
    activation=IntActivation(bits=8, symmetric=True, grid="narrow", granularity="tensor"),
)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def block_of(family: str = "llama") -> Block:
    return Block(uneven(build(family)), scheme=W8A8)


def transformed(block: Block, group: InputGroup, method: SmoothQuant) -> Tensor | None:
    stats = block.stats(group, [MinMax])
    if method.searches:
        block.search(group, stats)
    method.transform(group, stats)
    return group.scale


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_scales_are_those_of_equation_4(family: str, alpha: float) -> None:
    block = block_of(family)
    for group in block.groups:
        if group.producer is None:
            continue
        expected = naive_smoothquant_scale(block.inputs(group), list(group.weights.values()), alpha)
        producer_rows = group.producer.rows.tolist()
        expected = torch.stack(
            [
                max(scale for scale, other in zip(expected, producer_rows, strict=True) if other == row)
                for row in producer_rows
            ]
        )
        scale = transformed(block, group, SmoothQuant(alpha=alpha))
        assert scale is not None
        assert relative(scale, expected) < 1e-5


def test_the_weight_maximum_includes_skipped_linears_that_read_the_input() -> None:
    block = block_of()
    group = block.group("q_proj")
    quantized_name = next(iter(group.weights))
    group.others = {name: weight for name, weight in group.weights.items() if name != quantized_name}
    group.weights = {quantized_name: group.weights[quantized_name]}
    all_weights = [*group.weights.values(), *group.others.values()]
    expected = naive_smoothquant_scale(block.inputs(group), all_weights, 0.5)
    without_skipped = naive_smoothquant_scale(block.inputs(group), all_weights[:1], 0.5)
    scale = transformed(block, group, SmoothQuant(alpha=0.5))
    assert scale is not None
    assert relative(scale, expected) < 1e-5 < relative(scale, without_skipped)


def test_silent_channels_get_a_middle_scale_and_columns_of_zeros_have_a_floor() -> None:
    model = uneven(build("llama"))
    model.get_parameter("model.layers.0.input_layernorm.weight")[:2] = 0
    for name in ("q_proj", "k_proj", "v_proj"):
        model.get_parameter(f"model.layers.0.self_attn.{name}.weight")[:, 1:3] = 0
    block = Block(model, scheme=W8A8)
    before, group = logits(model), block.groups[0]
    expected = naive_smoothquant_scale(block.inputs(group), list(group.weights.values()), 0.8)
    with pytest.warns(UserWarning, match=r"^2 of \d+ input channels were silent on the calibration tokens"):
        scale = transformed(block, group, SmoothQuant())
    assert scale is not None
    assert (scale[2:].double() / expected[2:] - 1).abs().max() < 1e-4
    assert scale[2:].min() <= scale[0] <= scale[2:].max()
    assert relative(logits(model), before) < 1e-4


@pytest.mark.parametrize(("pairs", "scaled"), [("all", [True] * 4), ("norms", [True, False, True, False])])
@pytest.mark.parametrize("search", [False, True])
def test_pairs_choose_the_groups(pairs: Any, scaled: list[bool], search: bool) -> None:
    block = block_of()
    method = SmoothQuant(pairs=pairs, search=search)
    assert [transformed(block, group, method) is not None for group in block.groups] == scaled


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "bloom"])
def test_the_function_stays(family: str, search: bool) -> None:
    block = block_of(family)
    before = logits(block.model)
    for group in block.groups:
        transformed(block, group, SmoothQuant(search=search))
    assert any(group.scale is not None for group in block.groups)
    assert relative(logits(block.model), before) < 1e-4


def test_query_heads_of_one_value_head_share_their_largest_scale() -> None:
    block = block_of()
    group = block.group("o_proj")
    unshared = naive_smoothquant_scale(block.inputs(group), list(group.weights.values()), 0.8).view(2, 2, 8)
    scale = transformed(block, group, SmoothQuant())
    assert scale is not None
    assert relative(scale.view(2, 2, 8), unshared.amax(1, keepdim=True).expand(2, 2, 8)) < 1e-5
    assert relative(scale.view(2, 2, 8), unshared) > 0.01


@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_a_search_takes_the_best_and_never_loses(alpha: float) -> None:
    searched, untouched = block_of(), block_of()
    for group, untouched_group in zip(searched.groups, untouched.groups, strict=True):
        chosen_scale = transformed(searched, group, SmoothQuant(alpha=alpha, search=True))
        assert chosen_scale is not None
        untouched.search(untouched_group, untouched.stats(untouched_group, [MinMax]))
        absmax = untouched.inputs(untouched_group).abs().amax(0)[:, None].T
        candidates = [
            naive_smoothquant_scale(absmax, list(untouched_group.weights.values()), share).float()
            for share in (alpha, *(i / 20 for i in range(6, 20)))
        ]
        errors = [untouched_group.error(scale) for scale in (torch.ones_like(chosen_scale), *candidates)]
        assert untouched_group.error(chosen_scale) <= min(errors) * (1 + 1e-3)
        assert untouched_group.error(chosen_scale) <= errors[0]
        # The same rescaling in both models, for the next group.
        transformed(untouched, untouched_group, SmoothQuant(alpha=alpha, search=True))


def test_smoothing_lowers_the_error_where_channels_are_large(tiny: Callable[..., dict[str, Any]]) -> None:
    expected, errors = logits(uneven(build("llama"))), {}
    for method in ("rtn", "smoothquant"):
        model = uneven(build("llama"))
        result = quantize(model, build_run(tiny("scheme=w8a8_tensor", f"method={method}")), TOKENS)
        errors[method] = relative(logits(model), expected)
    layer = "model.layers.0."
    makers = [*["input_layernorm"] * 3, "self_attn.v_proj", *["post_attention_layernorm"] * 2, "mlp.up_proj"]
    assert [row["rescaled_by"] for row in result.layers[:7]] == [layer + maker for maker in makers]
    assert errors["smoothquant"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"^alpha={alpha} is out of range; expected 0 to 1"):
        SmoothQuant(alpha=alpha)
