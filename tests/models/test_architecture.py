"""Discovery on many families: blocks, linears, linears that read the same input, and a quantized run of each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.config import build_run
from harness.evaluation.perplexity import perplexity
from harness.models import Decoder, input_groups, split_skipped, weight_of
from tests.support.decoders import linears, quantize
from tests.support.families import FAMILIES, build
from tests.support.reference import naive_perplexity

# Names of the linears of block 0, grouped by the input that they read, in execution order.
_QKV, _GATED = ["q_proj", "k_proj", "v_proj"], [["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
GROUPS: dict[str, list[list[str]]] = {
    **{name: [_QKV, *_GATED] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")},
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "opt": [_QKV, ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "bloom": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    "mixtral": [_QKV, ["o_proj"]],
}
TOKENS = torch.arange(3, 35).view(2, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_the_first_block(family: str) -> None:
    model = build(family)
    prefix = f"{Decoder(model).name(0)}."
    modules = {name: module for name, module in linears(model).items() if name.startswith(prefix)}
    groups = input_groups(modules, lambda: model(input_ids=TOKENS))
    names = [[name.rpartition(".")[2] for name in group] for group in groups]
    if family == "falcon":  # parallel branches: either may run first
        names, expected = [sorted(group) for group in names], [sorted(group) for group in GROUPS[family]]
        assert sorted(names) == sorted(expected)
    else:
        assert sorted(names) == sorted(GROUPS[family])
    assert all(isinstance(module, nn.Module) for module in linears(model).values())


class Twice(nn.Module):
    """A block that calls one of three linears with the inputs of the others, and again with other inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first, self.twice, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        normed = self.norm(states)
        mixed = self.first(normed) * self.twice(normed) * self.last(normed)
        return states + mixed + self.twice(mixed)


class TwiceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)
        self.blocks = nn.ModuleList(Twice() for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        states = self.embed(input_ids)
        for block in self.blocks:
            states = block(states)
        return SimpleNamespace(logits=self.head(states))


def test_a_linear_that_is_called_again_with_other_inputs_is_a_group_of_its_own() -> None:
    block, states = Twice(), torch.randn(1, 4, 8)
    modules = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert input_groups(modules, lambda: block(states)) == [["first", "last"], ["twice"]]


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant"])
def test_a_linear_that_is_called_twice_is_quantized_once(method: str, tiny: Callable[..., dict[str, Any]]) -> None:
    model = TwiceModel()
    result = quantize(model, build_run(tiny(f"method={method}", "scheme=channel", "bits=4")), TOKENS)
    names = [row["name"].removeprefix("blocks.") for row in result.layers]
    assert names == [f"{i}.{name}" for i in range(2) for name in ("first", "last", "twice")]


@pytest.mark.parametrize("family", FAMILIES)
def test_rtn_runs_and_eight_bits_stay_close(family: str, tiny: Callable[..., dict[str, Any]]) -> None:
    model, cfg = build(family), build_run(tiny("scheme=channel", "bits=8"))
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
    result = quantize(model, cfg, TOKENS)
    with torch.no_grad():
        after = model(input_ids=TOKENS).logits
    assert 0 < (after - before).norm() / before.norm() < 0.05
    assert {layer["name"] for layer in result.layers} == set(linears(build(family)))
    assert result.warnings == Decoder(build(family)).notes()


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_of_every_family_equals_whole_logits(family: str) -> None:
    model = build(family)
    assert perplexity(model, TOKENS).perplexity == pytest.approx(naive_perplexity(model, TOKENS), rel=1e-5)


def test_fused_experts_are_listed_as_uncovered() -> None:
    names = Decoder(build("mixtral")).uncovered()
    assert any("experts" in name for name in names)
    assert not Decoder(build("llama")).uncovered()


def test_weight_of_a_transposed_linear_is_out_by_in() -> None:
    module = dict(linears(build("gpt2")))["transformer.h.0.attn.c_attn"]
    inputs = torch.randn(5, 32)
    assert weight_of(module).shape == (96, 32)
    torch.testing.assert_close(F.linear(inputs, weight_of(module), module.bias), module(inputs))  # type: ignore[arg-type]


def test_skip_patterns() -> None:
    names = ["layers.0.up", "layers.0.down", "layers.1.down"]
    assert split_skipped(names, ("*.down",)) == (["layers.0.up"], ["layers.0.down", "layers.1.down"])
    with pytest.raises(ValueError, match=r"skip=\*\.gate matches no linear; expected a pattern for names such as"):
        split_skipped(names, ("*.gate",))
    with pytest.raises(ValueError, match="matches all 3 linears; use method=none"):
        split_skipped(names, ("*",))


def test_a_model_that_cannot_run_on_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="model of class Linear cannot run on token ids alone .*; use method=none"):
        Decoder(nn.Linear(2, 2)).require()
