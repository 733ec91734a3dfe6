"""Fine-tuning of a block: the values that it trains, its targets, and everything that it must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from harness.config import build_run
from harness.core import AbsMean, Finetune, Method, QTensor, Scheme, Stats
from harness.core.formats import Tuner
from harness.nn import QuantLinear, first_of, replace
from harness.quantization import finetune as tuning
from harness.quantization import passes
from tests.support.blocks import TOKENS, logits, relative
from tests.support.decoders import quantize
from tests.support.families import build, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")

Tiny = Callable[..., dict[str, Any]]
QUIP = ("method=quip_sharp", "bits=2", "method.quip_sharp.passes=0")


class Scaled(QTensor):
    """A weight whose rows are correct up to their scale."""

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__((weight.shape[0], weight.shape[1]))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.half())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.get_buffer("weight") * self.scale.float()[:, None]).to(dtype)

    def tuner(self) -> Tuner:
        def accept(values: dict[str, Tensor]) -> None:
            self.scale = values["scale"].half()

        weight = self.get_buffer("weight")
        return Tuner({"scale": self.scale.float()}, lambda values: weight * values["scale"][:, None], accept)


class Block(nn.Module):
    """Two linears with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(16, 24, bias=False), nn.Linear(24, 16), nn.RMSNorm(24)

    def forward(self, states: Tensor) -> Tensor:
        return self.second(self.norm(self.first(states)))


def task(largest: float = 1.3, count: int = 16) -> tuple[Block, list[Tensor], list[Tensor]]:
    """A block with wrong scales and gains, its inputs, and the outputs that it should compute."""
    block = Block()
    inputs = [torch.randn(1, 12, 16) for _ in range(count)]
    with torch.no_grad():
        targets = [block(states) for states in inputs]
        block.norm.weight *= torch.rand(24) + 0.7
        for name in ("first", "second"):
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            weight = Scaled(linear.weight.detach(), torch.rand(linear.out_features) * (largest - 1) + 1)
            bias = None if linear.bias is None else linear.bias.detach()
            replace(block, name, QuantLinear(weight, bias, torch.float32))
    return block, inputs, targets


def error(block: Block, inputs: list[Tensor], targets: list[Tensor]) -> float:
    """Mean over tokens of the squared error, relative to the larger of output and target."""
    with torch.no_grad():
        pairs = [(block(x)[0].double(), y[0].double()) for x, y in zip(inputs, targets, strict=True)]
    errors = [float((y - t).square().sum() / max(y.square().sum(), t.square().sum())) for a, b in pairs
           for y, t in zip(a, b, strict=True)]  # fmt: skip
    return sum(errors) / len(errors)


def test_training_corrects_wrong_scales_and_gains() -> None:
    block, inputs, targets = task()
    before = error(block, inputs[7::8], targets[7::8])
    tuned = tuning.finetune(block, block, inputs, targets, Finetune(epochs=60, lr=0.02))
    assert tuned is not None
    assert tuned.before == pytest.approx(before, rel=1e-4)
    assert tuned.after < 0.02 * tuned.before
    held_out = error(block, inputs[7::8], targets[7::8])  # of the stored scales, in float16
    assert held_out < 1e-4 * before


def test_gradients_and_forwards_are_restored() -> None:
    block, inputs, targets = task()
    parameters = [parameter.requires_grad_(False) for parameter in block.parameters()]
    tuning.finetune(block, block, inputs, targets, Finetune(epochs=2, lr=0.02))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)
    assert not any("forward" in vars(module) for module in block.modules())
    assert not any(buffer.requires_grad for buffer in block.buffers())


def test_training_that_increases_the_error_is_discarded() -> None:
    block, inputs, targets = task()
    before = [tensor.clone() for tensor in (*block.parameters(), *block.buffers())]
    tuned = tuning.finetune(block, block, inputs, targets, Finetune(epochs=2, lr=50.0))
    assert tuned is not None
    assert tuned.after == tuned.before
    after = [*block.parameters(), *block.buffers()]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_a_block_without_tuners_has_nothing_to_train(tiny: Tiny) -> None:
    model = build("llama")
    quantize(model, build_run(tiny("method=rtn", "scheme=mxfp4")), TOKENS)
    block = model.get_submodule("model.layers.0")
    assert tuning.finetune(block, block, [torch.zeros(1)], [torch.zeros(1)], Finetune(epochs=1, lr=0.1)) is None


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lr": 0.0}, {"batch": 0}, {"lr": float("nan")}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one is out of range; expected more than 0"):
        Finetune(**{"epochs": 1, "lr": 0.1, **options})


@dataclass(frozen=True, kw_only=True)
class Halved(Method):
    """Quantizes weights to half their size; training can double the scale again."""

    needs: ClassVar = (AbsMean,)

    @property
    def finetune(self) -> Finetune:
        return Finetune(epochs=1, lr=0.01)

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        return Scaled(weight.clone(), torch.full((len(weight),), 0.5))


def test_a_block_is_trained_with_quantized_inputs_and_float_targets(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[Tensor], list[Tensor]]] = []

    def record(block: nn.Module, run: Any, inputs: Any, targets: Any, options: Finetune) -> None:
        calls.append(([x.clone() for x in inputs], [x.clone() for x in targets]))

    monkeypatch.setattr(passes, "finetune", record)
    model, plain = build("llama"), build("llama")
    cfg = replace_fields(build_run(tiny("method=rtn", "scheme=channel")), steps={"halved": Halved()})
    quantize(model, cfg, TOKENS)
    assert len(calls) == 2
    for index, (inputs, targets) in enumerate(calls):
        assert relative(torch.cat(inputs), states(model, index)[0]) < 1e-5
        assert relative(torch.cat(targets), states(plain, index)[1]) < 1e-5
    assert relative(states(model, 1)[0], states(plain, 1)[0]) > 0.01


def states(model: nn.Module, index: int) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a block, (B, T, D) each, recorded by a separate hook."""
    calls: list[tuple[Tensor, Tensor]] = []
    block = model.get_submodule(f"model.layers.{index}")
    handle = block.register_forward_hook(lambda _m, args, out: calls.append((args[0], first_of(out))))
    logits(model)
    handle.remove()
    return calls[0]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_training_brings_two_bits_closer_to_the_float_model_as_the_rows_report(tiny: Tiny, family: str) -> None:
    tokens = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(5))
    exact = logits(uneven(build(family)), tokens)
    errors = {}
    for epochs in (0, 8):
        model = uneven(build(family))
        result = quantize(model, build_run(tiny(*QUIP, f"method.quip_sharp.epochs={epochs}")), tokens)
        errors[epochs] = relative(logits(model, tokens), exact)
        if epochs:
            assert all(row["block_error"] <= row["block_error_untuned"] for row in result.layers)
            assert any(row["block_error"] < 0.9 * row["block_error_untuned"] for row in result.layers)
            for row in result.layers:
                packed = model.get_submodule(row["name"]).packed
                assert isinstance(packed, QTensor)
                assert row["stored_bits"] == packed.stored_bits
    assert errors[8] < errors[0]
