"""Learned rounding: its signs are those of autograd in float64, and what it stores is what it trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.core import FloatWeight, IntWeight, round_to_nearest
from harness.core.solvers.clip import clipped_ends
from harness.core.solvers.learned_rounding import Rounding

ROWS, COLUMNS, SIZE = 6, 64, 16
FORMATS: dict[str, IntWeight | FloatWeight] = {
    "group": IntWeight(bits=3, granularity="group", group_size=SIZE, scale_dtype="float32"),
    "channel": IntWeight(bits=2, scale_dtype="float32"),
    "tensor": IntWeight(bits=4, granularity="tensor", scale_dtype="float32"),
    "symmetric": IntWeight(bits=3, symmetric=True, granularity="group", group_size=SIZE, scale_dtype="float32"),
    "narrow": IntWeight(bits=4, symmetric=True, grid="narrow", scale_dtype="float32"),
    "e2m1": FloatWeight(element="e2m1", granularity="group", group_size=SIZE, scale_dtype="float32"),
    "mxfp4": FloatWeight(element="e2m1", granularity="group", group_size=32, scale_dtype="e8m0"),
    "nvfp4": FloatWeight(element="e2m1", granularity="group", group_size=SIZE, scale_dtype="e4m3", tensor_scale=True),
    "fp8_block": FloatWeight(element="e4m3", granularity="block", group_size=16),
}
SMOOTH = [name for name in FORMATS if name not in ("mxfp4", "nvfp4")]  # scales that move with their range


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(ROWS, COLUMNS // SIZE, generator=generator).mul(3).exp().repeat_interleave(SIZE, 1)
    return (torch.randn(ROWS, COLUMNS, generator=generator) + 0.3).mul(spread).double()


def passing(values: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` with the gradient of `values`."""
    return values + (rounded - values).detach()


class Naive:
    """The formulas of AutoRound with a graph, for one format."""

    def __init__(self, weight: Tensor, fmt: IntWeight | FloatWeight) -> None:
        self.fmt, self.shape = fmt, (weight.shape[0], weight.shape[1])
        self.groups = fmt.to_groups(weight)
        self.shift = torch.zeros_like(self.groups, requires_grad=True)
        ends = self.groups.amin(-1, keepdim=True), self.groups.amax(-1, keepdim=True)
        self.low, self.high = ends
        self.beta, self.alpha = (torch.ones_like(end, requires_grad=True) for end in ends)

    def weight(self) -> Tensor:
        low, high = self.low * self.beta, self.high * self.alpha
        values = self._integers(low, high) if isinstance(self.fmt, IntWeight) else self._floats(low, high)
        return self.fmt.from_groups(values, self.shape)

    def _integers(self, low: Tensor, high: Tensor) -> Tensor:
        fmt = self.fmt
        assert isinstance(fmt, IntWeight)
        if fmt.symmetric:
            scale, zero = torch.maximum(high, -low) / fmt.steps, torch.tensor(float(fmt.mid_code))
        else:
            scale = (high - low) / fmt.max_code
            zero = passing(-low / scale, (-low / scale).round())
        scale = passing(scale, scale.float().double())
        steps = self.groups / scale + self.shift
        codes = (passing(steps, steps.round()) + zero).clamp(0, fmt.max_code)
        return (codes - zero) * scale

    def _floats(self, low: Tensor, high: Tensor) -> Tensor:
        fmt = self.fmt
        assert isinstance(fmt, FloatWeight)
        scale = torch.maximum(high, -low) / fmt.covered
        scale = passing(scale, scale.float().double())
        steps = self.groups / scale + self.shift
        half = 0.5
        bounded = steps.clamp(-fmt.covered - half, fmt.covered + half)  # no gradient outside
        inside = (steps.detach().abs() <= fmt.covered + half).double()
        rounded = fmt.kind.round_(steps.detach().clone())
        elements = inside * passing(bounded, rounded) + (1 - inside) * rounded
        return elements * scale


@pytest.mark.parametrize("name", SMOOTH)
def test_each_step_follows_the_signs_of_the_formulas(name: str) -> None:
    naive, trained = Naive(weights(), FORMATS[name]), Rounding(weights(), FORMATS[name])
    generator = torch.Generator().manual_seed(1)
    lr = 0.03
    for _ in range(12):
        rounded = naive.weight()
        torch.testing.assert_close(trained.weight(torch.float64), rounded.detach())
        gradient = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
        slopes = torch.autograd.grad((rounded * gradient).sum(), [naive.shift, naive.beta, naive.alpha])
        trained.step(gradient, lr)
        with torch.no_grad():
            for tensor, slope, bounds in zip(
                (naive.shift, naive.beta, naive.alpha), slopes, ((-0.5, 0.5), (0.1, 1), (0.1, 1)), strict=True
            ):
                tensor.sub_(lr * slope.sign()).clamp_(*bounds)
    shift, beta, alpha = trained.state()
    assert float(beta.min()) < 0.95
    assert float(alpha.min()) < 0.95
    torch.testing.assert_close(shift, naive.shift.detach())
    torch.testing.assert_close(beta, naive.beta.detach()[..., 0])
    torch.testing.assert_close(alpha, naive.alpha.detach()[..., 0])


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_was_trained(name: str) -> None:
    fmt, weight = FORMATS[name], weights().float()
    trained = Rounding(weight, fmt)
    assert torch.equal(trained.weight(torch.float32), round_to_nearest(weight, fmt).dequantize())
    start = trained.state()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        trained.step(torch.randn(ROWS, COLUMNS, generator=generator), 0.02)
    assert not torch.equal(trained.weight(torch.float32), round_to_nearest(weight, fmt).dequantize())
    assert torch.equal(trained.quantized().dequantize(), trained.weight(torch.float32))
    trained.restore(start)
    assert torch.equal(trained.quantized().dequantize(), round_to_nearest(weight, fmt).dequantize())


@pytest.mark.parametrize("name", SMOOTH)  # scales in powers of two or bytes may be better above their range
def test_it_starts_from_the_ranges_that_it_is_given(name: str) -> None:
    fmt, weight = FORMATS[name], weights().float()
    ends = clipped_ends(weight, fmt, torch.eye(COLUMNS))
    rounded = fmt.quantized(weight, fmt.cover(*ends, fmt.whole(weight))).dequantize()
    found = Rounding(weight, fmt, ends=ends).quantized().dequantize()
    assert float((found - rounded).norm() / rounded.norm()) < 1e-3  # factors of ends are not exact
    silent = torch.ones(COLUMNS, dtype=torch.bool)  # their weights stay covered
    whole = Rounding(weight, fmt, silent, ends).quantized().dequantize()
    assert torch.equal(whole, round_to_nearest(weight, fmt).dequantize())


@pytest.mark.parametrize("name", ["group", "e2m1"])
def test_parts_of_a_large_weight_are_one_weight(name: str) -> None:
    """A weight of more values than are computed at once."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 4096, 48)
    whole, top = Rounding(weight, FORMATS[name]), Rounding(weight[:40], FORMATS[name])
    for _ in range(3):
        whole.step(gradient, 0.1)
        top.step(gradient[:40], 0.1)
    assert torch.equal(whole.weight(torch.float32)[:40], top.weight(torch.float32))
