"""Which modules are decoder blocks and linears: families with several lists or classes of blocks, or odd linears."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from harness.calibration import Stream, verify
from harness.config import build_run
from harness.models import Decoder
from harness.models.probe import probe_tokens
from harness.quantization import Result, check
from harness.utils.names import kind_of
from tests.support.blocks import TOKENS, logits, relative
from tests.support.decoders import quantize

_TINY = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
_LLAMA = _TINY | {
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_MIXED = {"num_hidden_layers": 4, "mamba_d_state": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "zamba2": _LLAMA
    | _MIXED
    | {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 16},
    "hrm_text": _LLAMA,
    "git": _LLAMA
    | {
        "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    },
    "jamba": _LLAMA
    | _MIXED
    | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1},
    "llama4_text": _LLAMA
    | _EXPERTS
    | {"head_dim": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2},
    "phimoe": _LLAMA | _EXPERTS,
    "mixtral": _LLAMA | _EXPERTS,
    "mamba": _TINY | {"state_size": 8},
    "mamba2": _TINY | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "rwkv": _TINY | {"attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
    "openai-gpt": {"vocab_size": 128, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4  # so that blocks move the logits
    return model


def quantized(family: str, tiny: Callable[..., dict[str, Any]], *overrides: str) -> tuple[nn.Module, Result]:
    model = build(family)
    cfg = build_run(tiny("scheme=channel", "bits=4", *overrides))
    return model, quantize(model, cfg, TOKENS)


BLOCKS = {
    "zamba2": [f"model.layers.{i}" for i in range(4)],
    "hrm_text": [f"model.{stack}_module.layers.{i}" for stack in "LH" for i in range(2)],
    "git": ["git.encoder.layer.0", "git.encoder.layer.1"],
    "jamba": [f"model.layers.{i}" for i in range(4)],
    "rwkv": ["rwkv.blocks.0", "rwkv.blocks.1"],
}


@pytest.mark.parametrize("family", BLOCKS)
def test_blocks_are_the_items_of_all_lists_that_run(family: str) -> None:
    decoder = Decoder(build(family))
    assert decoder.names == BLOCKS[family]
    assert [decoder.model.get_submodule(name) for name in decoder.names] == decoder.blocks
    linears = decoder.linears()
    assert list(linears) == list(dict.fromkeys(name for i in range(len(decoder.blocks)) for name in decoder.linears(i)))
    assert all(any(name.startswith(f"{block}.") for name in linears) for block in decoder.names)


FLOATS = {
    "llama4_text": ["model.layers.1.feed_forward.router stays float: calling it does not compute x W^T + b"],
    "phimoe": ["model.layers.*.mlp.router stays float: calling it does not compute x W^T + b"],
    "mixtral": ["model.layers.*.mlp.experts.down_proj stays float: it belongs to no linear"],
    "mamba": ["backbone.layers.*.mixer.dt_proj stays float: its weight is read while the module does not run"],
    "rwkv": ["rwkv.blocks.*.attention.output stays float: its weight is read while the module does not run"],
}


@pytest.mark.parametrize("family", FLOATS)
def test_what_is_no_linear_stays_float_with_one_warning_for_all_blocks(
    family: str, tiny: Callable[..., dict[str, Any]]
) -> None:
    expected = logits(build(family))
    model, result = quantized(family, tiny, "bits=8")
    assert set(FLOATS[family]) <= set(result.warnings)
    assert 0 < relative(logits(model), expected) < 0.2
    floats = {kind_of(name) for name in Decoder(build(family)).uncovered()}
    assert not floats & {kind_of(row["name"]) for row in result.layers}


@pytest.mark.parametrize("family", ["zamba2", "hrm_text", "git", "jamba", "mamba2"])
def test_rounding_quantizes_every_linear_of_the_blocks(family: str, tiny: Callable[..., dict[str, Any]]) -> None:
    names = list(Decoder(build(family)).linears())
    expected = logits(build(family))
    model, result = quantized(family, tiny)
    assert [row["name"] for row in result.layers] == names
    assert 0 < relative(logits(model), expected) < 0.8


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("hrm_text", r"calls model\.L_module\.layers\.0 6 times in a forward, expected each block once"),
        ("zamba2", r"shares weights between model\.layers\.1 and model\.layers\.3"),
    ],
)
def test_blocks_that_cannot_be_replayed_are_refused_by_name(
    family: str, reason: str, tiny: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match=f"{reason}; it cannot be calibrated block by block, use a data-free method"):
        quantized(family, tiny, "method=gptq")


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama4_text", "phimoe", "openai-gpt", "jamba"])
def test_calibrated_methods_run_block_by_block(family: str, method: str, tiny: Callable[..., dict[str, Any]]) -> None:
    expected = logits(build(family))
    model, result = quantized(family, tiny, f"method={method}")
    assert [row["name"] for row in result.layers]
    assert {row["name"] for row in result.layers} == set(Decoder(build(family)).linears())
    assert 0 < relative(logits(model), expected) < 0.8


def test_blocks_that_return_a_list_are_replayed() -> None:
    decoder = Decoder(build("openai-gpt"))
    with torch.no_grad():
        verify(decoder, TOKENS[:1])
        stream, outputs = Stream(decoder, TOKENS[:1]), list[Tensor]()
        decoder.blocks[0].register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
        logits(decoder.model, TOKENS[:1])
        assert torch.equal(stream.run(stream.states[0]), outputs[0])


def test_a_pattern_may_skip_what_stays_float_anyway(tiny: Callable[..., dict[str, Any]]) -> None:
    plain, skipped = (
        quantized("llama4_text", tiny, *skip)[1] for skip in ([], ["skip=['*.router','*.feed_forward.up_proj']"])
    )
    missing = {row["name"] for row in plain.layers if "weight_error" in row}
    missing -= {row["name"] for row in skipped.layers if "weight_error" in row}
    assert missing == {"model.layers.0.feed_forward.up_proj"}


def test_bits_per_weight_counts_all_matrices_of_the_blocks(tiny: Callable[..., dict[str, Any]]) -> None:
    matrices = {
        name: parameter.numel()
        for name, parameter in build("mixtral").named_parameters()
        if ".layers." in name and parameter.dim() > 1
    }
    linears = sum(count for name, count in matrices.items() if "_proj.weight" in name)
    _, result = quantized("mixtral", tiny)
    stored = sum(row["stored_bits"] for row in result.layers)
    total = sum(matrices.values())
    assert linears < 0.3 * total  # most of it are experts, which stay float
    assert result.quantized_share == linears / total
    assert result.bits_per_weight == (stored + 32 * (total - linears)) / total


def test_a_model_without_a_list_of_blocks_runs_only_as_float(tiny: Callable[..., dict[str, Any]]) -> None:
    model = Lone()
    result = quantize(model, build_run(tiny("method=none")), TOKENS)
    assert result.bits_per_weight == 32
    with pytest.raises(ValueError, match="model of class Lone has no list of decoder blocks that runs on tokens; use"):
        quantize(model, build_run(tiny("method=rtn", "scheme=channel")), TOKENS)


class Lone(nn.Module):
    """Tokens through one linear, with a list of blocks that never runs and a list of linears that are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)
        self.idle = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        self.adapters = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        states = self.embed(input_ids)
        for adapter in self.adapters:
            states = adapter(states)
        return SimpleNamespace(logits=self.head(states))


class Odd(nn.Linear):
    """A subclass of nn.Linear that computes what `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__(8, 8)
        self.how = how

    def forward(self, input: Tensor) -> Any:
        output = super().forward(input)
        return {"same": output, "scaled": output * 1.01, "tuple": (output, None)}[self.how]


class OddBlock(nn.Module):
    """A block with an odd linear, one that is read and not called, one asked for its dtype, and experts."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.odd, self.read, self.asked = Odd(how), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.idle = nn.Linear(8, 8)

    def forward(self, states: Tensor) -> Tensor:
        odd = self.odd(states)
        states = states + (odd[0] if isinstance(odd, tuple) else odd)
        states = states + F.linear(states, self.read.weight.t().contiguous())
        states = self.asked(states.to(self.asked.weight.dtype))
        return self.experts[2](self.experts[0](states)) + self.experts[1](states[:, :0]).sum()


class OddModel(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)
        self.blocks = nn.ModuleList(OddBlock(how) for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        states = self.embed(input_ids)
        for block in self.blocks:
            states = block(states)
        return SimpleNamespace(logits=self.head(states))


@pytest.mark.parametrize("how", ["same", "scaled", "tuple"])
def test_a_linear_is_what_computes_one(how: str, tiny: Callable[..., dict[str, Any]]) -> None:
    decoder = Decoder(OddModel(how))
    names = {name.removeprefix("blocks.0.") for name in decoder.linears(0)}
    assert names == {"asked", "experts.0", "experts.1", "experts.2"} | ({"odd"} if how == "same" else set())
    assert decoder.notes() == [
        *(["blocks.*.odd stays float: calling it does not compute x W^T + b"] if how != "same" else []),
        "blocks.*.read stays float: its weight is read while the module does not run",
        "blocks.*.idle stays float: it did not run on the probe tokens",
    ]
    expected = logits(decoder.model)
    quantize(decoder.model, build_run(tiny("method=rtn", "scheme=channel", "bits=8")), TOKENS)
    assert 0 < relative(logits(decoder.model), expected) < 0.05


def test_a_skeleton_shows_the_blocks_and_linears_of_the_model() -> None:
    for family, probed in (("zamba2", True), ("git", True), ("mamba", True), ("mixtral", False)):
        decoder = Decoder(build(family))
        with torch.device("meta"):
            skeleton = Decoder(build(family))
        assert skeleton.probed is probed
        assert skeleton.names == decoder.names
        assert skeleton.linears().keys() == decoder.linears().keys()


def test_a_skeleton_that_cannot_run_refuses_no_shape(tiny: Callable[..., dict[str, Any]]) -> None:
    cfg = build_run(tiny("method=rtn", "scheme=group32", "scheme.weight.group_size=24"))
    with torch.device("meta"):
        skeleton = Decoder(build("mixtral"))
    check(skeleton, cfg)
    with pytest.raises(ValueError, match="group_size=24 does not divide in_features=32 of model.layers.0.self_attn"):
        check(Decoder(build("mixtral")), cfg)


def test_probe_tokens_avoid_the_ids_that_the_config_names() -> None:
    model = build("git")
    ids = probe_tokens(model)[0].tolist()
    assert len(set(ids)) == 32
    assert model.config.pad_token_id not in ids
