"""Replay block by block: equal to the model for every family; a model that cannot be replayed is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from harness.calibration import Stream, shortcuts
from harness.config import build_run
from harness.models import Decoder, linears_of
from harness.quantization import passes
from tests.conftest import TINY, resolve
from tests.support.blocks import TOKENS, codes_of, logits, relative
from tests.support.decoders import linears, quantize, verify
from tests.support.decoders import stream as stream_of
from tests.support.families import FAMILIES, build, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Named(NamedTuple):
    states: Tensor
    extra: Tensor | None


class Toy(nn.Module):
    """A decoder of two linear blocks; `defect` is the way in which replay cannot reproduce it."""

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.defect, self.passes = defect, 0
        self.embed, self.head = nn.Embedding(128, 8), nn.Linear(8, 128)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        if defect == "named":  # no defect: blocks that return a named tuple
            for block in self.blocks:
                block.register_forward_hook(lambda _module, _args, states: Named(states, None))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        states = self.embed(input_ids)
        extra = states.mean() if self.defect == "tokens" else torch.ones(())
        for block in self.blocks:
            if self.defect == "skips" and block is self.blocks[1]:
                continue
            if self.defect == "between" and block is self.blocks[1]:
                states = states + 0.1
            states = block(hidden_states=states, extra=extra)
            extra = states.mean() if self.defect == "later tokens" else extra
            states = states.states if isinstance(states, Named) else states
        if self.defect == "twice":
            states = self.blocks[1](hidden_states=self.blocks[0](hidden_states=states, extra=extra), extra=extra)
        if self.defect == "ignored":
            states = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(states))


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, extra: Tensor) -> Tensor:
        return hidden_states + self.linear(hidden_states).tanh() * extra


def counted(module: nn.Module) -> list[int]:
    """A list that grows by one item at each call of the module."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _module, _args: calls.append(1))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_states_equal_those_of_the_model(family: str) -> None:
    model = uneven(build(family))
    blocks = Decoder(model).blocks
    expected: list[list[Tensor]] = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(
            lambda _m, _a, output, states=states: states.append(output[0] if isinstance(output, tuple) else output)
        )
        for block, states in zip(blocks, expected, strict=True)
    ]
    for sequence in TOKENS:
        logits(model, sequence[None])
    for handle in handles:
        handle.remove()
    stream = stream_of(model, TOKENS)
    for outputs in expected:
        stream.advance()
        assert len(stream.states) == len(outputs) == len(TOKENS)
        for states, output in zip(stream.states, outputs, strict=True):
            assert relative(states, output) < 1e-6
    verify(model, TOKENS[:1])


def test_arguments_that_the_model_passes_to_its_blocks_are_stored() -> None:
    stream = stream_of(build("llama"), TOKENS)
    args, options = stream.calls[1]
    assert args == ()
    cos, sin = options["position_embeddings"]
    assert cos.shape == sin.shape == (1, 16, 8)
    assert options["position_ids"].tolist() == [list(range(16))]
    assert "hidden_states" not in options
    assert [states.shape for states in stream.states] == [(1, 16, 32)] * 4


def test_a_copy_of_a_block_runs_in_the_precision_of_its_states() -> None:
    model = uneven(build("llama"))
    stream = stream_of(model, TOKENS)
    expected = stream.run(stream.states[0])
    output = stream.run(stream.states[0].double(), copy.deepcopy(stream.blocks[0]).double())
    assert output.dtype == torch.float64
    assert relative(output, expected) < 1e-5


@pytest.mark.parametrize("defect", ["none", "named"])
def test_a_model_without_defect_is_replayed(defect: str) -> None:
    verify(Toy(defect), TOKENS[:1])


@pytest.mark.parametrize("defect", ["between", "ignored"])
def test_a_model_that_replay_does_not_reproduce_is_refused(defect: str) -> None:
    with pytest.raises(
        ValueError, match=r"replaying the 2 blocks of Toy does not reproduce its logits: the relative error is"
    ):
        verify(Toy(defect), TOKENS[:1])


def test_a_model_whose_states_change_from_pass_to_pass_is_refused() -> None:
    model, passes = build("llama"), [0]

    def drift(_module: nn.Module, args: Any, options: Any) -> Any:
        passes[0] += 1
        changed = [states + 0.1 * passes[0] for states in (*args, *([] if args else [options["hidden_states"]]))]
        return (tuple(changed), options) if args else (args, options | {"hidden_states": changed[0]})

    model.get_submodule("model.layers.1").register_forward_pre_hook(drift, with_kwargs=True)
    with pytest.raises(ValueError, match="blocks of LlamaForCausalLM does not reproduce its logits"):
        verify(model, TOKENS[:1])


def test_inputs_that_depend_on_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="Toy passes its blocks token-dependent arguments besides the hidden states;"):
        stream_of(Toy("tokens"), TOKENS)


def test_a_model_that_passes_states_of_one_block_to_the_next_is_refused() -> None:
    with pytest.raises(ValueError, match=r"passes blocks\.1 token-dependent arguments besides the hidden states; it"):
        verify(Toy("later tokens"), TOKENS[:1])


@pytest.mark.parametrize(("defect", "block", "count"), [("skips", 1, 0), ("twice", 0, 2)])
def test_a_model_that_calls_a_block_not_once_is_refused(defect: str, block: int, count: int) -> None:
    with pytest.raises(ValueError, match=rf"Toy calls blocks\.{block} {count} times in a forward, expected each block"):
        stream_of(Toy(defect), TOKENS)


def test_capture_ends_before_the_first_block() -> None:
    model = build("llama")
    decoder = Decoder(model)
    first, last = (counted(model.get_submodule(f"model.layers.{i}.mlp")) for i in (0, 1))
    Stream(decoder, TOKENS)
    assert len(first) == 1  # one forward records the arguments of all blocks
    assert not last


def test_a_forward_ends_after_all_watched_linears_were_called() -> None:
    model = build("llama")
    stream, layer = stream_of(model, TOKENS), "model.layers.0."
    gate, down = model.get_submodule(layer + "mlp.gate_proj"), model.get_submodule(layer + "mlp.down_proj")
    calls, inputs = counted(down), list[Tensor]()
    assert stream.outputs({gate: inputs.append}, keep=False) == []
    assert [tensor.shape for tensor in inputs] == [(1, 16, 32)] * 4
    assert not calls
    outputs = stream.outputs({gate: inputs.append}, keep=True)
    assert len(inputs) == 8
    assert len(calls) == len(outputs) == 4
    assert torch.equal(outputs[2], stream.run(stream.states[2]))


def test_a_linear_that_is_called_twice_is_observed_twice() -> None:
    model = Toy("")
    linear = model.blocks[0].linear
    model.blocks[0].register_forward_hook(lambda _block, _args, states: linear(states))
    stream, inputs = stream_of(model, TOKENS), list[Tensor]()
    assert stream.outputs({linear: inputs.append}, keep=False) == []
    assert len(inputs) == 2 * len(TOKENS)


def test_reading_states_runs_the_blocks_in_their_present_state() -> None:
    model = build("llama")
    stream = stream_of(model, TOKENS)
    calls = counted(stream.blocks[0])
    stream.advance()
    assert not calls
    model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(3)
    states = stream.states[1]
    assert len(calls) == 4
    fresh = stream_of(model, TOKENS)
    assert torch.equal(states, fresh.run(fresh.states[1]))


def test_outputs_passed_to_advance_become_the_states() -> None:
    stream = stream_of(build("llama"), TOKENS)
    outputs = [torch.full_like(states, 2.0) for states in stream.states]
    stream.advance(outputs)
    assert all(torch.equal(states, output) for states, output in zip(stream.states, outputs, strict=True))


def test_a_copy_of_a_stream_advances_on_its_own() -> None:
    stream = stream_of(build("llama"), TOKENS)
    before, copied = [*stream.states], stream.copy()
    expected = [copied.run(states) for states in before]
    copied.advance()
    assert all(map(torch.equal, copied.states, expected))
    assert all(states is first for states, first in zip(stream.states, before, strict=True))
    assert (stream.position, copied.position) == (0, 1)


# Linears whose output is the output of a module inside the block.
ENDS = {
    **{name: ["self_attn.o_proj", "mlp.down_proj"] for name in FAMILIES},
    "opt": ["self_attn.out_proj"],  # the module that ends in fc2 is the block itself
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "gemma2": ["mlp.down_proj"],  # its attention also returns the attention weights
    "bloom": [],  # its modules add the residual to the output of their last linear
    "falcon": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "mixtral": ["self_attn.o_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_end_in_a_linear_compute_from_its_stored_inputs(family: str) -> None:
    model = uneven(build(family))
    stream = stream_of(model, TOKENS)
    block = stream.blocks[0]
    cuts = shortcuts(block, lambda: stream.run(stream.states[0]))
    names = {id(module): name for name, module in linears_of(block).items()}
    assert sorted(names[id(cut.linear)] for cut in cuts) == sorted(ENDS[family])
    for cut in cuts:
        stream.shortcuts = [cut]
        before = stream.outputs({cut.linear: lambda _inputs: None}, keep=True)
        others = counted(next(module for module in linears_of(cut.module).values() if module is not cut.linear))
        cut.linear.weight.data[0] += 1  # later outputs are those of the changed linear
        short = stream.outputs({}, keep=True)
        assert not others
        runs = counted(cut.linear)
        again = stream.outputs({}, keep=True)  # the outputs of a final linear are kept
        assert not runs
        assert all(torch.equal(output, expected) for output, expected in zip(again, short, strict=True))
        stream.shortcuts = ()
        plain = stream.outputs({}, keep=True)
        assert len(others) == 4
        assert all(torch.equal(output, expected) for output, expected in zip(short, plain, strict=True))
        assert not torch.equal(short[0], before[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_shortcuts_change_no_code(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = build_run(resolve(*TINY, "method=gptq", "scheme=channel"))
    codes = []
    for short in (True, False):
        model = uneven(build(family))
        if not short:
            monkeypatch.setattr(passes, "shortcuts", lambda *_: [])
        quantize(model, cfg, TOKENS)
        codes.append(codes_of(model))
    assert codes[0].keys() == codes[1].keys() == linears(build(family)).keys()
    assert all(torch.equal(value, codes[1][name]) for name, value in codes[0].items())
