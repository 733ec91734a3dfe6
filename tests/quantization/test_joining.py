"""Packed linears of one input group are joined: decoding gives the same bits, and the record says how many."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.config import RunConfig, build_run
from harness.kernels.joint import JoinedLinear
from harness.kernels.native.incoherent import IncoherentLinear
from harness.kernels.reordered import Reordered
from harness.models import Decoder, input_groups
from harness.nn import QuantLinear, resident_bytes
from harness.quantization import engine, joining
from harness.runs import execute_run
from tests.support.blocks import TOKENS
from tests.support.decoders import quantize
from tests.support.families import build, uneven
from tests.support.kernels import built

Tiny = Callable[..., dict[str, Any]]
_GROUPS = ("method=rtn", "scheme.weight.granularity=group", "scheme.weight.group_size=16")


def decoded(model: nn.Module) -> Tensor:
    """Logits after a prompt and three tokens, each decoded with the cache."""
    with torch.inference_mode():
        output = model(input_ids=TOKENS[:1, :8], use_cache=True)
        logits = [output.logits[:, -1]]
        for token in TOKENS[:1, 8:11].split(1, dim=1):
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[:, -1])
    return torch.cat(logits)


def packed(family: str, cfg: RunConfig) -> tuple[nn.Module, int]:
    model = uneven(build(family))
    return model, quantize(model, cfg, TOKENS).joined


@built
@pytest.mark.parametrize(
    ("family", "per_block"),
    [("llama", 5), ("qwen2", 5), ("gemma2", 5), ("opt", 3), ("falcon", 2), ("gpt2", 0), ("phi3", 0)],
)
def test_decoding_gives_the_same_bits(family: str, per_block: int, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = build_run(tiny(*_GROUPS))
    model, joined = packed(family, cfg)
    assert joined == 2 * per_block
    kernels = [module.packed for module in model.modules() if isinstance(module, QuantLinear)]
    assert sum(isinstance(kernel, JoinedLinear) for kernel in kernels) == joined
    monkeypatch.setattr(engine, "join_linears", lambda decoder: 0)
    apart, none = packed(family, cfg)
    assert none == 0
    assert torch.equal(decoded(model), decoded(apart))
    assert resident_bytes(model) == resident_bytes(apart)


@built
def test_the_record_says_how_many(tiny: Tiny) -> None:
    for options, joined in (((), 10), (("execution=simulated",), None), (("skip=[*.k_proj,*.up_proj]",), 4)):
        assert execute_run(tiny(*_GROUPS, *options))[0].execution.joined == joined


@built
def test_linears_whose_inputs_are_rounded_outside_their_kernel_are_not_joined(tiny: Tiny) -> None:
    """Each of them makes codes of its own, so no two get the same tensor."""
    inputs = "{bits: 8, symmetric: false, granularity: token}"
    assert packed("llama", build_run(tiny(*_GROUPS, f"+scheme.activation={inputs}")))[1] == 0


def test_without_the_library_nothing_is_joined(tiny: Tiny, torch_kernels: None) -> None:
    assert packed("llama", build_run(tiny(*_GROUPS)))[1] == 0


@built
def test_a_model_whose_kernels_cannot_be_joined_is_not_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "logits", lambda *_: pytest.fail("the model was run"))
    model, joined = packed("llama", build_run(tiny("method=quip_sharp", "bits=2", "method.quip_sharp.passes=0")))
    assert joined == 0
    kernels = [module.packed for module in model.modules() if isinstance(module, QuantLinear)]
    assert sum(isinstance(kernel, IncoherentLinear) for kernel in kernels) == len(kernels) > 2


@built
def test_the_others_of_an_input_group_are_joined(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries whose columns have another order read the same inputs, but are computed apart."""

    def join_without_queries(decoder: Decoder) -> int:
        for name, module in decoder.model.named_modules():
            if name.endswith("q_proj"):
                module.packed = Reordered(module.packed, torch.arange(module.shape[1]))
        return joining.join_linears(decoder)

    expected = decoded(packed("llama", build_run(tiny(*_GROUPS)))[0])
    monkeypatch.setattr(engine, "join_linears", join_without_queries)
    model, joined = packed("llama", build_run(tiny(*_GROUPS)))
    assert joined == 2 * 4
    assert torch.equal(decoded(model), expected)


class InPlace(nn.Module):
    """Changes its input between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, states: Tensor) -> SimpleNamespace:
        outputs = self.first(states) + self.second(states)
        states += 1
        return SimpleNamespace(logits=outputs + self.last(states))


def test_a_tensor_that_was_changed_in_place_is_another_input() -> None:
    module = InPlace()
    groups = input_groups(dict(module.named_children()), lambda: module(torch.zeros(1, 8)))
    assert groups == [["first", "second"], ["last"]]
