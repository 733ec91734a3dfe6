"""Rotations of blocks of inputs: the function stays, linears are renamed, and 4-bit floats with outliers gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import build_run
from harness.core import hadamard
from harness.core.rotated import Rotated
from harness.models import Decoder
from harness.nn import QuantLinear
from methods.rotate_block import RotateBlock
from tests.support.blocks import TOKENS, logits, relative
from tests.support.decoders import quantize
from tests.support.families import build

pytestmark = pytest.mark.usefixtures("torch_kernels")

Tiny = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def blocks_of(size: int, columns: int) -> Tensor:
    """The block diagonal matrix, (K, K) float64."""
    return torch.block_diag(*[hadamard.rotate(torch.eye(size, dtype=torch.float64))] * (columns // size))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [2, 16])
def test_the_function_stays_and_weights_are_rotated(family: str, size: int) -> None:
    model = build(family)
    before, old = logits(model), copy.deepcopy(model)
    decoder = Decoder(model)
    names = list(decoder.linears())
    RotateBlock(size=size).prepare(model, {name: weight(model, name) for name in names})
    assert relative(logits(model), before) < 1e-5
    for name in names:
        assert isinstance(model.get_submodule(name), Rotated)
        expected = weight(old, name).double() @ blocks_of(size, weight(old, name).shape[1])
        assert relative(weight(model, f"{name}.linear"), expected) < 1e-6


def weight(model: torch.nn.Module, name: str) -> Tensor:
    module = model.get_submodule(name)
    values = module.get_parameter("weight").detach()
    return values.T if type(module).__name__ == "Conv1D" else values


@pytest.mark.parametrize("pair", [("rtn", "rotate_block"), ("gptq", "rotate_block_gptq")])
def test_outliers_are_spread_over_their_block(pair: tuple[str, str], tiny: Tiny) -> None:
    model = build("llama", hidden_size=64, intermediate_size=128)
    for name in Decoder(model).linears():
        weight(model, name)[:, 7::32] *= 8
    expected, errors = logits(model), []
    for method in pair:
        trial = copy.deepcopy(model)
        result = quantize(trial, build_run(tiny(f"method={method}", "scheme=mxfp4")), TOKENS)
        names = [name for name, module in trial.named_modules() if isinstance(module, QuantLinear)]
        assert all(name.endswith(".linear") == method.startswith("rotate") for name in names)
        assert sorted(row["name"] for row in result.layers) == sorted(names)
        errors.append(relative(logits(trial), expected))
    assert errors[1] < errors[0]


def test_a_size_that_does_not_divide_names_the_linear() -> None:
    model = build("llama")
    weights = {name: weight(model, name) for name in Decoder(model).linears()}
    with pytest.raises(ValueError, match=r"size=64 does not divide in_features=32 of model.layers.0.self_attn.q_proj"):
        RotateBlock(size=64).prepare(model, weights)


@pytest.mark.parametrize("size", [0, 1, 24, -32])
def test_a_size_that_is_no_power_of_two_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size} is no power of two; expected 16, 32, 64 or 128"):
        RotateBlock(size=size)
