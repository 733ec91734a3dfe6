"""Methods that solve a block as a whole: the block that they receive, its gradients, and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import Block, Method, QTensor, round_to_nearest
from harness.nn import QuantLinear
from tests.quantization.test_engine import TOKENS, Tiny, config
from tests.support.decoders import linears, quantize
from tests.support.families import build

pytestmark = pytest.mark.usefixtures("torch_kernels")


@dataclass(frozen=True, kw_only=True)
class BlockRecorder(Method):
    """Records the blocks that it receives, with outputs for the float weights, and rounds."""

    blocks: list[Any]
    missing: bool = False

    def quantize_block(self, block: Block) -> Mapping[str, QTensor]:
        alone = [block.run(block.weights, states) for states in block.inputs]
        floats = [block.run(block.weights, states) for states in block.reference]
        together = block.run(block.weights, torch.cat(list(block.inputs)))
        self.blocks.append((block, alone, floats, together))
        quantized = {name: round_to_nearest(x, block.schemes[name].format) for name, x in block.weights.items()}
        return dict(list(quantized.items())[1:]) if self.missing else quantized


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("propagate", ["quantized", "float"])
def test_a_block_has_the_states_of_both_streams_and_runs_with_other_weights(
    tiny: Tiny, family: str, propagate: str
) -> None:
    recorder, float_model, model = BlockRecorder(blocks=[]), build(family), build(family)
    cfg = config(tiny, "scheme=channel", "bits=2", f"engine.propagate={propagate}", recorder=recorder)
    quantize(model, cfg, TOKENS)
    assert len(recorder.blocks) == 2
    for index, (block, alone, floats, together) in enumerate(recorder.blocks):
        assert list(block.weights) == [name for name in linears(float_model) if f".{index}." in name]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat(floats), torch.cat(list(block.targets)), rtol=1e-4, atol=1e-5)
        same = index == 0 or propagate == "float"
        assert torch.equal(torch.cat(list(block.inputs)), torch.cat(list(block.reference))) == same
    block = recorder.blocks[1][0]
    rounded = {name: round_to_nearest(weight, cfg.scheme.weight).dequantize() for name, weight in block.weights.items()}
    for name, weight in rounded.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, QuantLinear)
        assert linear.packed is not None
        assert torch.equal(linear.packed.dequantize(), weight)


def test_a_run_with_other_weights_has_gradients_and_quantized_inputs(tiny: Tiny) -> None:
    slopes: dict[str, dict[str, Tensor]] = {}

    @dataclass(frozen=True, kw_only=True)
    class Differentiates(BlockRecorder):
        scheme: str

        def quantize_block(self, block: Block) -> Mapping[str, QTensor]:
            leaves = {name: weight.clone().requires_grad_() for name, weight in block.weights.items()}
            states = block.inputs[0].clone().requires_grad_()
            with torch.enable_grad():
                outputs = block.run(leaves, states)
                found = torch.autograd.grad(outputs.square().sum(), [states, *leaves.values()])
            slopes.setdefault(self.scheme, dict(zip(("states", *leaves), (outputs.detach(), *found), strict=False)))
            return super().quantize_block(block)

    for scheme in ("channel", "w8a8_token", "w4a4_token"):
        quantize(build("llama"), config(tiny, f"scheme={scheme}", d=Differentiates(blocks=[], scheme=scheme)), TOKENS)
    exact, close, far = (slopes[scheme] for scheme in ("channel", "w8a8_token", "w4a4_token"))
    for name, slope in exact.items():
        assert slope.norm() > 0
        errors = [float((other[name] - slope).norm() / slope.norm()) for other in (close, far)]
        assert 0 < errors[0] < 0.1, name
        assert errors[0] < errors[1] < 2, name


def test_a_block_without_one_of_its_weights_is_refused(tiny: Tiny) -> None:
    cfg = config(tiny, "scheme=channel", recorder=BlockRecorder(blocks=[], missing=True))
    with pytest.raises(ValueError, match="quantize_block returned no weight for model.layers.0.self"):
        quantize(build("llama"), cfg, TOKENS)


def test_a_block_whose_linears_all_stay_float_is_passed(tiny: Tiny) -> None:
    recorder = BlockRecorder(blocks=[])
    result = quantize(
        build("llama"), config(tiny, "scheme=channel", "skip=['model.layers.0.*']", recorder=recorder), TOKENS
    )
    assert [next(iter(block.weights)) for block, *_ in recorder.blocks] == ["model.layers.1.self_attn.q_proj"]
    assert sum(row["bits_per_weight"] < 32 for row in result.layers) == 7
