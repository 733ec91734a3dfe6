"""The engine: what it shows to a method, in which order, and which methods it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from harness import engine
from harness.architecture import linears, weight_of
from harness.config import RunConfig, build_run
from harness.core.method import InputGroup, Method
from harness.core.qtensor import QTensor, round_to_nearest
from harness.core.scheme import Scheme
from harness.core.stats import MinMax, Stat, Stats
from harness.linear import QuantLinear
from methods.rtn import RTN
from tests.families import build

Tiny = Callable[..., dict[str, Any]]
TOKENS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))


class Rows(Stat):
    """Every input, kept: what a streamed statistic must have seen."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.rows = torch.zeros(0, in_features)

    def update(self, inputs: Tensor) -> None:
        self.rows = torch.cat([self.rows, inputs])


@dataclass(frozen=True, kw_only=True)
class Nosy(Method):
    """Keeps what it is shown."""

    needs: ClassVar = (Rows,)
    groups: list[tuple[str, ...]]
    seen: list[Tensor]

    def transform(self, group: InputGroup, stats: Stats) -> None:
        self.groups.append(tuple(name.rpartition(".")[2] for name in group.linears))

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        self.seen.append(stats[Rows].rows)
        return round_to_nearest(weight, scheme.weight)


@dataclass(frozen=True, kw_only=True)
class SwapChannels(Method):
    """Permutes the hidden channels of each mlp: another float model that computes the same."""

    def prepare(self, model: nn.Module) -> None:
        for name, module in linears(model).items():
            order = torch.arange(64).flip(0)
            if name.endswith("down_proj"):
                module.weight.data = module.weight.data[:, order]  # type: ignore[union-attr,index]
            elif "mlp" in name:
                module.weight.data = module.weight.data[order]  # type: ignore[union-attr,index]


@dataclass(frozen=True, kw_only=True)
class Doubles(Method):
    """A wrong rewrite, in `prepare` or in `transform`."""

    hook: str

    def prepare(self, model: nn.Module) -> None:
        if self.hook == "prepare":
            next(iter(linears(model).values())).weight.data.mul_(2)  # type: ignore[union-attr,operator]

    def transform(self, group: InputGroup, stats: Stats) -> None:
        if self.hook == "transform":
            next(iter(group.linears.values())).weight.data.mul_(2)  # type: ignore[union-attr,operator]


def config(tiny: Tiny, *overrides: str, **steps: Method) -> RunConfig:
    return replace(build_run(tiny(*overrides)), steps=steps)


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """The inputs (T, K) that a linear sees on TOKENS, by a hook of the test's own."""
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, _out: caught.append(args[0]))
    with torch.no_grad():
        for sequence in TOKENS:
            model(input_ids=sequence[None])
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in caught])


def test_groups_come_in_order_and_every_linear_gets_its_own_inputs(tiny: Tiny) -> None:
    model, nosy = build("llama"), Nosy(groups=[], seen=[])
    names = list(linears(model))
    expected = [inputs_of(model, name) for name in names]
    engine.quantize(model, config(tiny, "scheme=channel", "engine.propagate=float", nosy=nosy), TOKENS)
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert nosy.groups == block * 2
    assert len(nosy.seen) == len(names)
    for seen, wanted in zip(nosy.seen, expected, strict=True):
        torch.testing.assert_close(seen, wanted)
    assert nosy.seen[0].shape == (TOKENS.numel(), 32)


def test_a_rewrite_composes_with_rtn_as_by_hand(tiny: Tiny) -> None:
    composed, by_hand = build("llama"), build("llama")
    cfg = config(tiny, "scheme=channel", swap=SwapChannels(), rtn=RTN())
    engine.quantize(composed, cfg, TOKENS)
    SwapChannels().prepare(by_hand)
    assert cfg.scheme is not None
    for name, module in linears(by_hand).items():
        found = composed.get_submodule(name)
        assert isinstance(found, QuantLinear)
        assert found.packed is not None
        wanted = round_to_nearest(weight_of(module), cfg.scheme.weight).dequantize()
        assert torch.equal(found.packed.dequantize(), wanted)


@pytest.mark.parametrize("hook", ["prepare", "transform"])
def test_a_step_that_changes_the_function_is_refused(tiny: Tiny, hook: str) -> None:
    cfg = config(tiny, "scheme=channel", doubles=Doubles(hook=hook), rtn=RTN())
    with pytest.raises(ValueError, match="method.doubles changed the float model's function: .* moved by"):
        engine.quantize(build("llama"), cfg, TOKENS)


@dataclass(frozen=True, kw_only=True)
class Rude(Method):
    """Breaks the contract of `quantize` in one of many ways."""

    how: str

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> Any:
        if self.how == "nothing":
            return None
        if self.how == "shape":
            return round_to_nearest(weight[:, :8], scheme.weight)
        found = round_to_nearest(weight, scheme.weight)
        if self.how == "in place":
            weight.mul_(1.0)
        if self.how == "nan":
            found.scale[0, 0] = torch.nan
        return found


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing", r"quantize returned NoneType of shape \(\); expected a QTensor of shape \(32, 32\)"),
        ("shape", r"quantize returned IntQTensor of shape \(32, 8\); expected a QTensor of shape \(32, 32\)"),
        ("in place", "quantize changed the weight that it was given"),
        ("nan", "the quantized weight decodes to NaN or infinite values"),
    ],
)
def test_quantize_is_held_to_the_contract(tiny: Tiny, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model.layers.0.self_attn.q_proj: {message}"):
        engine.quantize(build("llama"), config(tiny, "scheme=channel", rude=Rude(how=how)), TOKENS)


def test_static_activation_ranges_are_those_of_the_float_inputs(tiny: Tiny) -> None:
    model = build("llama")
    expected = {name: inputs_of(model, name).abs().max() for name in linears(model)}
    engine.quantize(model, config(tiny, "scheme=w8a8_static", rtn=RTN()), TOKENS)
    for name, absmax in expected.items():
        quantizer = model.get_submodule(name).input_quantizer
        torch.testing.assert_close(quantizer.scale, absmax / 127)  # type: ignore[union-attr]


def test_an_error_of_a_method_names_the_linear(tiny: Tiny) -> None:
    model = build("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: the weight holds NaN or infinite values"):
        engine.quantize(model, config(tiny, "scheme=channel", rtn=RTN()), TOKENS)


def test_minmax_streams() -> None:
    stat = MinMax(3)
    for part in (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-4.0, 0.5, 1.0]])):
        stat.update(part)
    assert (float(stat.low), float(stat.high)) == (-4.0, 3.0)
