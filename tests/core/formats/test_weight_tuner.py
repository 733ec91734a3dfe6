"""Weights trained under rounding: gradients are those of the formulas, and what is stored is what was trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import FloatWeight, IntWeight, LearnedWeight, LevelsWeight, WeightFormat, round_to_nearest
from harness.core.formats import MixedQTensor, PermutedQTensor, weight_tuner

FORMATS: dict[str, WeightFormat] = {
    "integer": IntWeight(bits=3, granularity="group", group_size=8),
    "float_zero": IntWeight(bits=3, granularity="group", group_size=8, zero_point="float"),
    "symmetric": IntWeight(bits=4, symmetric=True),
    "tensor": IntWeight(bits=8, granularity="tensor"),
    "fp8_block": FloatWeight(element="e4m3", granularity="block", group_size=10),
    "mxfp4": FloatWeight(element="e2m1", granularity="group", group_size=8, scale_dtype="e8m0"),
    "nvfp4": FloatWeight(element="e2m1", granularity="group", group_size=8, scale_dtype="e4m3", tensor_scale=True),
    "learned": LearnedWeight(levels="learned", bits=2, levels_dtype="float32"),
    "learned_groups": LearnedWeight(
        levels="learned", bits=2, granularity="group", group_size=8, levels_dtype="float32", scale_dtype="float32"
    ),
    "nf4": LevelsWeight(table="nf4", granularity="flat", group_size=64, double_quant=True),
}
TRAINED = {
    "float_zero": {"weight", "scale", "zero_point"},
    "mxfp4": {"weight"},
    "nvfp4": {"weight"},
    "learned": {"weight", "levels"},
    "learned_groups": {"weight", "levels", "scale", "zero_point"},
    "nf4": {"weight"},
}
WEIGHT = torch.randn(20, 40, generator=torch.Generator().manual_seed(1))


def other_codes(fmt: WeightFormat, weight: Tensor = WEIGHT) -> Any:
    """A quantized weight whose codes are not those of rounding to nearest."""
    return round_to_nearest(weight + 0.3 * torch.randn(20, 40, generator=torch.Generator().manual_seed(2)), fmt)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_it_starts_from_the_stored_codes_between_them_and_the_weight(name: str, permuted: bool) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    fmt = FORMATS[name]
    qtensor = PermutedQTensor(other_codes(fmt, WEIGHT[:, order]), order) if permuted else other_codes(fmt)
    tuner = weight_tuner(qtensor, WEIGHT)
    assert tuner is not None
    assert set(tuner.values) == TRAINED.get(name, {"weight", "scale"})
    torch.testing.assert_close(tuner.weight(tuner.values), qtensor.dequantize(), rtol=1e-6, atol=1e-7)
    start = tuner.values["weight"][:, order.argsort()] if permuted else tuner.values["weight"]
    decoded = qtensor.dequantize()
    share = (start - decoded) / torch.where(decoded == WEIGHT, 1, WEIGHT - decoded)
    assert ((share > -1e-3) & (share < 1 + 1e-3)).all()
    assert (share > 0.01).float().mean() > 0.8  # the others are where the weight is far outside of the range


@pytest.mark.parametrize("name", FORMATS)
def test_moved_values_are_rounded_anew_and_stored(name: str) -> None:
    qtensor = other_codes(FORMATS[name])
    bits = qtensor.stored_bits
    tuner = weight_tuner(qtensor, WEIGHT)
    assert tuner is not None
    moved = {key: value * 2 for key, value in tuner.values.items()}  # exact in every dtype
    moved["weight"] = moved["weight"].flip(0)
    expected = tuner.weight(moved)
    assert not torch.equal(expected, qtensor.dequantize())
    tuner.accept(moved)
    tolerance = 1e-3 if name == "nf4" else 1e-6  # its scales are stored in 8 bits anew
    torch.testing.assert_close(qtensor.dequantize(), expected, rtol=tolerance, atol=1e-7)
    assert qtensor.stored_bits == bits


def naive(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Integers by LSQ: every operation has its own gradient, and that of rounding is 1."""
    groups = weight.view(20, 5, 8)
    steps = groups / scale[..., None] + zero_point[..., None]
    clipped = steps.clamp(0, 2**bits - 1)
    codes = clipped + (clipped.round() - clipped).detach()
    return ((codes - zero_point[..., None]) * scale[..., None]).view(20, 40)


def test_gradients_are_those_of_the_formulas_in_float64() -> None:
    qtensor = other_codes(FORMATS["float_zero"])
    tuner = weight_tuner(qtensor, WEIGHT)
    assert tuner is not None
    slope = torch.randn(20, 40, generator=torch.Generator().manual_seed(3))
    values = {name: (value * 0.8).requires_grad_() for name, value in tuner.values.items()}
    (tuner.weight(values) * slope).sum().backward()
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    (naive(exact["weight"], exact["scale"], exact["zero_point"], 3) * slope).sum().backward()
    for name, value in values.items():
        torch.testing.assert_close(value.grad, exact[name].grad.float(), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_gradients_of_levels_under_scales_are_those_of_autograd() -> None:
    qtensor = other_codes(FORMATS["learned_groups"])
    tuner = weight_tuner(qtensor, WEIGHT)
    assert tuner is not None
    values = {name: value.clone().requires_grad_() for name, value in tuner.values.items()}
    slope = torch.randn(20, 40, generator=torch.Generator().manual_seed(3))
    (tuner.weight(values) * slope).sum().backward()
    levels = values["levels"].detach().clone().requires_grad_()
    steps = levels.gather(1, qtensor.codes.long()).view(20, 5, 8) - qtensor.zero_point[..., None]
    ((steps * qtensor.scale[..., None]).view(20, 40) * slope).sum().backward()
    torch.testing.assert_close(values["levels"].grad, levels.grad)


def test_gradients_of_levels_are_those_of_the_weights_that_have_them() -> None:
    qtensor = other_codes(FORMATS["learned"])
    tuner = weight_tuner(qtensor, WEIGHT)
    assert tuner is not None
    values = {name: value.requires_grad_() for name, value in tuner.values.items()}
    slope = torch.randn(20, 40, generator=torch.Generator().manual_seed(3))
    (tuner.weight(values) * slope).sum().backward()
    found = values["levels"].grad
    assert found is not None
    for row in range(20):
        for level in range(4):
            expected = slope[row][qtensor.codes[row] == level].sum()
            assert float(found[row, level]) == pytest.approx(float(expected), abs=1e-5)


def test_codes_that_no_rounding_finds_have_no_tuner() -> None:
    base = other_codes(FORMATS["integer"])
    assert weight_tuner(MixedQTensor(base, torch.tensor([3]), WEIGHT[:, [3]]), WEIGHT) is None
