"""Producers on every family: which module absorbs a scale, that the function stays, and refusal of wrong producers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.config import RunConfig, build_run
from harness.core import InputGroup, Producer
from harness.models import Decoder, weight_of
from harness.nn import QuantLinear
from harness.quantization.producer_proof import Found, Scratch
from harness.quantization.producers import Discovery
from tests.conftest import TINY, resolve
from tests.support.blocks import TOKENS, Block, logits, relative
from tests.support.decoders import linears, quantize
from tests.support.families import FAMILIES, build, uneven

Expected = tuple[str, str, list[int]] | None


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def heads(firsts: list[int], size: int = 8) -> list[int]:
    """Rows of heads that start at `firsts`."""
    return [first + i for first in firsts for i in range(size)]


_ALL, _SHARED = list(range(32)), heads([0, 0, 8, 8])
_UP: Expected = ("mlp.up_proj", "linear", list(range(64)))
_VALUE: Expected = ("self_attn.v_proj", "linear", _SHARED)
_LLAMA: list[Expected] = [
    ("input_layernorm", "norm", _ALL),
    _VALUE,
    ("post_attention_layernorm", "norm", _ALL),
    _UP,
]
_FUSED_HEADS = heads([16, 40, 64, 88])  # rows: query, key and value of head 0, then of head 1, ...

_GEMMA2: list[Expected] = [
    ("input_layernorm", "offset_norm", _ALL),
    _VALUE,
    ("pre_feedforward_layernorm", "offset_norm", _ALL),
    _UP,
]
PRODUCERS: dict[str, list[Expected]] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3"], _LLAMA),
    "gemma": [
        ("input_layernorm", "offset_norm", _ALL),
        _VALUE,
        ("post_attention_layernorm", "offset_norm", _ALL),
        _UP,
    ],
    **dict.fromkeys(["gemma2", "gemma3_text"], _GEMMA2),
    "phi3": [
        ("input_layernorm", "norm", _ALL),
        ("self_attn.qkv_proj", "linear", heads([48, 48, 56, 56])),
        ("post_attention_layernorm", "norm", _ALL),
        ("mlp.gate_up_proj", "linear", list(range(64, 128))),
    ],
    "opt": [None, ("self_attn.v_proj", "linear", _ALL), None, ("fc1", "linear", list(range(64)))],
    "gpt2": [("ln_1", "norm", _ALL), ("attn.c_attn", "linear", list(range(64, 96))), ("ln_2", "norm", _ALL), None],
    "gpt_neox": [
        ("input_layernorm", "norm", _ALL),
        ("attention.query_key_value", "linear", _FUSED_HEADS),
        ("post_attention_layernorm", "norm", _ALL),
        None,
    ],
    "bloom": [
        ("input_layernorm", "norm", _ALL),
        ("self_attention.query_key_value", "linear", _FUSED_HEADS),
        ("post_attention_layernorm", "norm", _ALL),
        None,
    ],
    "falcon": [
        ("input_layernorm", "norm", _ALL),
        ("self_attention.query_key_value", "linear", heads([40, 40, 40, 40])),
        None,
    ],
    "mixtral": [("input_layernorm", "norm", _ALL), _VALUE],
}


def summary(producer: Producer | None, prefix: str) -> Expected:
    return None if producer is None else (producer.name.removeprefix(prefix), producer.kind, producer.rows.tolist())


def factors(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).mul(3).sub(1.5).exp()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("uneven_too", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_producer_of_every_group(family: str, uneven_too: bool, index: int) -> None:
    block = Block(uneven(build(family)) if uneven_too else build(family), index)
    assert [summary(group.producer, block.prefix) for group in block.groups] == PRODUCERS[family]


def test_norms_before_attention_are_proved_in_a_family_with_norms_after_it() -> None:
    block = Block(uneven(build("opt", do_layer_norm_before=True, word_embed_proj_dim=32)))
    first, value, second, hidden = [summary(group.producer, block.prefix) for group in block.groups]
    assert first == ("self_attn_layer_norm", "norm", _ALL)
    assert second == ("final_layer_norm", "norm", _ALL)
    assert [value, hidden] == [PRODUCERS["opt"][1], PRODUCERS["opt"][3]]


def test_a_row_without_effect_on_the_probe_tokens_is_a_producer_too() -> None:
    model = uneven(build("opt"))
    model.get_parameter("model.decoder.layers.0.fc1.bias")[5:9] = -1e3  # zero behind the ReLU at every token
    block = Block(model)
    assert not block.inputs(block.group("fc2"))[:, 5:9].any()
    assert summary(block.group("fc2").producer, block.prefix) == PRODUCERS["opt"][3]


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_by_random_factors_keeps_the_logits(family: str) -> None:
    model = uneven(build(family))
    before = logits(model)
    for index in (0, 1):
        for i, group in enumerate(Block(model, index).groups):
            if group.producer is not None:
                group.rescale(factors(group.in_features, i))
    assert relative(logits(model), before) < 1e-4


def test_a_rescaled_weight_and_its_producer_equal_the_formulas() -> None:
    block = Block(uneven(build("gpt2")).double())
    group, scale = block.group("attn.c_attn"), factors(32).double()
    norm = block.model.get_submodule(block.prefix + "ln_1")
    (weight,) = group.weights.values()
    before = {"weight": weight.clone(), "gain": norm.weight.data.clone(), "bias": norm.bias.data.clone()}
    group.rescale(scale)
    assert relative(weight, before["weight"] * scale) < 1e-12
    assert relative(norm.weight, before["gain"] / scale) < 1e-12
    assert relative(norm.bias, before["bias"] / scale) < 1e-12
    assert group.scale is not None
    group.rescale(scale)
    assert relative(group.scale, scale**2) < 1e-12


def test_an_offset_norm_stores_its_gain_minus_one() -> None:
    block = Block(uneven(build("gemma")).double())
    group, scale = block.groups[0], factors(32).double()
    norm = block.model.get_submodule(block.prefix + "input_layernorm")
    gain = 1 + norm.weight.data
    group.rescale(scale)
    assert relative(1 + norm.weight, gain / scale) < 1e-12


@pytest.mark.parametrize(
    ("family", "reader", "producer", "rows"),
    [
        ("qwen2", "self_attn.o_proj", "self_attn.v_proj", slice(0, 16)),
        ("gpt2", "attn.c_proj", "attn.c_attn", slice(64, 96)),
        ("opt", "fc2", "fc1", slice(0, 64)),
    ],
)
def test_biases_are_scaled_and_unused_rows_stay(family: str, reader: str, producer: str, rows: slice) -> None:
    block = Block(uneven(build(family)).double())
    module, group = block.model.get_submodule(block.prefix + producer), block.group(reader)
    assert group.producer is not None
    bias, weight = module.bias.data.clone(), weight_of(module).data.clone()
    group.rescale(factors(group.in_features).double())
    factor = torch.ones_like(bias)
    tied = group.tie(factors(group.in_features).double())
    for channel, row in enumerate(group.producer.rows.tolist()):
        factor[row] = tied[channel]
    assert relative(module.bias, bias / factor) < 1e-12
    assert relative(weight_of(module), weight / factor[:, None]) < 1e-12
    assert (factor[rows] != 1).all()
    assert len(bias) == len(factor[rows]) + int((factor == 1).sum())


def test_query_heads_of_one_value_head_share_the_largest_scale() -> None:
    group = Block(build("llama")).group("o_proj")
    scale = factors(32)
    tied = group.tie(scale).view(4, 8)
    for head in range(4):
        pair = [head // 2 * 2, head // 2 * 2 + 1]
        assert torch.equal(tied[head], scale.view(4, 8)[pair].amax(0))


@pytest.mark.parametrize(
    ("family", "candidate", "reader"),
    [
        ("llama", Found("mlp.gate_proj", "linear", torch.arange(64)), "mlp.down_proj"),
        ("llama", Found("mlp.up_proj", "linear", torch.arange(64).roll(1)), "mlp.down_proj"),
        ("llama", Found("self_attn.v_proj", "linear", torch.arange(16).repeat(2)), "self_attn.o_proj"),
        ("llama", Found("post_attention_layernorm", "norm", torch.arange(32)), "self_attn.q_proj"),
        ("llama", Found("input_layernorm", "norm", torch.arange(32)), "self_attn.q_proj"),  # k and v read it too
        ("llama", Found("input_layernorm", "norm", torch.arange(16)), "self_attn.q_proj"),
        ("llama", Found("no_such_norm", "norm", torch.arange(32)), "self_attn.q_proj"),
        ("gemma", Found("pre_feedforward_layernorm", "norm", torch.arange(32)), "mlp.down_proj"),
        ("phi3", Found("mlp.gate_up_proj", "linear", torch.arange(64)), "mlp.down_proj"),
        ("gpt2", Found("mlp.c_fc", "linear", torch.arange(128)), "mlp.c_proj"),
        ("gpt2", Found("attn.c_attn", "linear", torch.arange(32)), "attn.c_proj"),
        ("gpt_neox", Found("attention.query_key_value", "linear", torch.arange(64, 96)), "attention.dense"),
        ("opt", Found("final_layer_norm", "norm", torch.arange(32)), "fc1"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_producer_is_refused(family: str, candidate: Found, reader: str, dtype: torch.dtype) -> None:
    block = Block(uneven(build(family)))
    scratch = Scratch(block.stream.blocks[0], block.stream, dtype)
    assert not scratch.proves(candidate, (reader,))


_QUERY_KEY_VALUE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_RIGHT = [
    (Found("input_layernorm", "norm", torch.arange(32)), _QUERY_KEY_VALUE),
    (Found("self_attn.v_proj", "linear", torch.tensor(_SHARED)), ("self_attn.o_proj",)),
    (Found("mlp.up_proj", "linear", torch.arange(64)), ("mlp.down_proj",)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_producers_are_proved_together(dtype: torch.dtype) -> None:
    block = Block(uneven(build("llama")))
    assert Scratch(block.stream.blocks[0], block.stream, dtype).proves_together(_RIGHT)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_one_wrong_producer_among_several_is_refused(wrong: int) -> None:
    block, (found, members) = Block(uneven(build("llama"))), _RIGHT[wrong]
    candidates = [*_RIGHT[:wrong], (Found(found.name, found.kind, found.rows.roll(1)), members), *_RIGHT[wrong + 1 :]]
    assert not Scratch(block.stream.blocks[0], block.stream, torch.float32).proves_together(candidates)


@pytest.mark.parametrize("kind", ["norm", "offset_norm"])
def test_the_wrong_kind_of_a_norm_is_refused(kind: Any) -> None:
    family = {"norm": "gemma", "offset_norm": "llama"}[kind]  # whose norms are of the other kind
    block = Block(uneven(build(family)))
    scratch = Scratch(block.stream.blocks[0], block.stream)
    members = tuple(name.removeprefix(block.prefix) for name in block.groups[0].linears)
    assert not scratch.proves(Found("input_layernorm", kind, torch.arange(32)), members)


def test_discovery_does_not_change_the_model() -> None:
    model = uneven(build("bloom"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Block(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_block_of_another_structure_is_measured_again() -> None:
    model = uneven(build("llama"))
    first, second = Block(model, 0), Block(model, 1)
    layer = model.get_submodule("model.layers.1.mlp")
    layer.act_fn, layer.gate_proj, layer.up_proj = nn.Identity(), layer.up_proj, layer.gate_proj
    discovery = Discovery()
    discovery.producers(first.stream, first.groups, first.prefix)

    class Swapped(nn.Module):
        """An mlp that applies the activation to the output of up_proj."""

        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, states: Tensor) -> Tensor:
            return self.down_proj(torch.nn.functional.silu(self.up_proj(states)) * self.gate_proj(states))

    model.get_submodule("model.layers.1").mlp = Swapped(layer)
    discovery.producers(second.stream, second.groups, second.prefix)
    assert summary(first.groups[3].producer, first.prefix) == _UP
    assert summary(second.groups[3].producer, second.prefix) == ("mlp.gate_proj", "linear", list(range(64)))


def test_rescaling_a_group_without_a_producer_is_refused() -> None:
    group = Block(build("gpt2")).group("mlp.c_proj")
    with pytest.raises(ValueError, match="the input of transformer.h.0.mlp.c_proj has no producer that could absorb"):
        group.rescale(torch.ones(128))


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan])
def test_a_scale_that_is_not_positive_and_finite_is_refused(bad: float) -> None:
    group: InputGroup = Block(build("llama")).groups[0]
    scale = torch.ones(32)
    scale[3] = bad
    with pytest.raises(ValueError, match=r"a scale for model.layers.0.self_attn.q_proj \+ .* is not positive and fin"):
        group.rescale(scale)


METHODS = ["smoothquant", "awq", "gptq", "awq_gptq", "smoothquant_gptq"]


@functools.cache
def configured(method: str) -> RunConfig:
    scheme = ["scheme=w8a8_token"] if method == "smoothquant" else ["scheme=channel", "bits=4"]
    ratios = ["method.awq.ratios=3"] if method.startswith("awq") else []  # a shorter search
    return build_run(resolve(*TINY, f"method={method}", *scheme, *ratios))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_runs_on_every_family(family: str, method: str) -> None:
    model = build(family)
    before = logits(model)
    result = quantize(model, configured(method), TOKENS)
    after = logits(model)
    assert torch.isfinite(after).all()
    assert 0 < relative(after, before) < 0.5
    assert sorted(row["name"] for row in result.layers) == sorted(linears(build(family)))
    assert all(isinstance(model.get_submodule(row["name"]), QuantLinear) for row in result.layers)
    assert all(0 < row["weight_error"] < 0.3 and 0 < row["output_error"] < 0.5 for row in result.layers)
    assert result.warnings == Decoder(build(family)).notes() + unscaled_notes(family, method)


def unscaled_notes(family: str, method: str) -> list[str]:
    if method == "gptq":
        return []
    block = Block(build(family))
    names = [
        group.name.replace(block.prefix, "")
        for group, expected in zip(block.groups, PRODUCERS[family], strict=True)
        if expected is None
    ]
    label = method.removesuffix("_gptq")
    return [
        f"method.{label}: no producer was proved for {name} in blocks 0-1; their inputs are not rescaled"
        for name in names
    ]
