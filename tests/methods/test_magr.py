"""MagR: the proximal map is the minimum, the descent is that of a naive float64 version, and ranges shrink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import build_run
from harness.core import Hessian, IntWeight, Scheme, Stats
from methods.gptq import GPTQ
from methods.magr import MagR, largest_eigenvalue, reduced
from tests.conftest import resolve
from tests.support.decoders import quantize
from tests.support.families import build

pytestmark = pytest.mark.usefixtures("torch_kernels")
Tiny = Callable[..., dict[str, Any]]
TOKENS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))
SCHEME = Scheme(name="group16", weight=IntWeight(bits=2, granularity="group", group_size=16))
WEIGHT = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def statistics(silent: tuple[int, ...] = ()) -> Stats:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    inputs[:, list(silent)] = 0
    stats = Stats([Hessian], 32)
    stats.update(inputs)
    return stats


def naive_prox(values: Tensor, radius: float) -> Tensor:
    """argmin_x 1/2 |x - v|^2 + radius max|x|, by bisection of the limit at which |v| - limit sums to the radius."""
    low, high = 0.0, float(values.abs().max())
    if values.abs().sum() <= radius:
        return torch.zeros_like(values)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (values.abs() - middle).clamp(min=0).sum() > radius else (low, middle)
    return values.clamp(-high, high)


def naive(W: Tensor, H: Tensor, alpha: float, steps: int, size: int) -> Tensor:
    """Equation by equation, one group of one row at a time."""
    H = H / (torch.linalg.eigvalsh(H)[-1] * 1.01)
    found = W.clone()
    for row in range(len(W)):
        w = W[row].clone()
        for _ in range(steps):
            v = w - H @ (w - W[row])
            for start in range(0, len(w), size):
                group = slice(start, start + size)
                radius = alpha * float(W[row, group].square().mean().sqrt())
                w[group] = naive_prox(v[group], radius)
        found[row] = w
    return found


@pytest.mark.parametrize("radius", [0.01, 0.5, 5.0, 1000.0])
def test_the_proximal_map_is_the_minimum(radius: float) -> None:
    values = WEIGHT.double()
    found = reduced(values, torch.full((8, 1), radius, dtype=torch.float64))
    for row in range(8):
        torch.testing.assert_close(found[row], naive_prox(values[row], radius), rtol=0, atol=1e-12)


def test_the_eigenvalue_is_bounded_from_above() -> None:
    H = statistics()[Hessian].value.double()
    exact = float(torch.linalg.eigvalsh(H)[-1])
    assert exact <= float(largest_eigenvalue(H)) <= 1.02 * exact


def test_steps_are_those_of_a_naive_version_in_float64() -> None:
    stats = statistics()
    method = MagR(alpha=0.3, steps=20)
    found = method.adjust(WEIGHT.double(), SCHEME, stats)
    expected = naive(WEIGHT.double(), stats[Hessian].value.double(), 0.3, 20, 16)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # the eigenvalue is found by 30 power steps
    torch.testing.assert_close(method.adjust(WEIGHT, SCHEME, stats), found.float(), rtol=1e-4, atol=1e-4)


def test_ranges_shrink_at_a_small_output_error() -> None:
    stats = statistics()
    found = MagR(alpha=0.05, steps=100).adjust(WEIGHT, SCHEME, stats)
    ranges = [W.view(8, 2, 16).abs().amax(-1).mean() for W in (WEIGHT, found)]
    H = stats[Hessian].value
    error, size = (float(((D @ H) * D).sum()) for D in (found - WEIGHT, WEIGHT))
    assert ranges[1] < 0.85 * ranges[0]
    assert error < 0.02 * size


def test_silent_inputs_keep_their_weights() -> None:
    with pytest.warns(UserWarning, match=r"^2 of 32 input channels were silent .*; their weights are not adjusted$"):
        found = MagR(alpha=0.3).adjust(WEIGHT, SCHEME, statistics((3, 20)))
    assert torch.equal(found[:, [3, 20]], WEIGHT[:, [3, 20]])
    assert not torch.equal(found, WEIGHT)


def test_the_next_step_quantizes_the_adjusted_weight(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    received, adjusted = [], []
    quantize_gptq, adjust = GPTQ.quantize, MagR.adjust

    def spied_quantize(self: Any, weight: Tensor, scheme: Scheme, stats: Stats) -> Any:
        received.append(weight)
        return quantize_gptq(self, weight, scheme, stats)

    def spied_adjust(self: Any, weight: Tensor, scheme: Scheme, stats: Stats) -> Tensor:
        adjusted.append(adjust(self, weight, scheme, stats))
        return adjusted[-1]

    monkeypatch.setattr(GPTQ, "quantize", spied_quantize)
    monkeypatch.setattr(MagR, "adjust", spied_adjust)
    cfg = build_run(tiny("method=magr_gptq", "scheme=channel", "bits=2"))
    result = quantize(build("llama"), cfg, TOKENS)
    assert len(received) == len(result.layers) == 14
    assert all(map(torch.equal, received, adjusted))
    assert all(row["weight_error"] > 0 for row in result.layers)  # against the float model's weight


@pytest.mark.parametrize("last", ["rtn", "autoround"])
def test_it_comes_before_rounding_and_before_methods_that_solve_blocks(tiny: Tiny, last: str) -> None:
    raw = tiny("method=magr", "scheme=channel", "bits=2")
    raw["method"] |= resolve(f"method={last}")["method"]
    plain = tiny(f"method={last}", "scheme=channel", "bits=2")
    results = [quantize(build("llama"), build_run(each), TOKENS) for each in (raw, plain)]
    errors = [[row["weight_error"] for row in result.layers] for result in results]
    assert errors[0] != errors[1]


def test_alone_it_rounds_the_adjusted_weights(tiny: Tiny) -> None:
    alone = quantize(build("llama"), build_run(tiny("method=magr", "scheme=channel", "bits=2")), TOKENS)
    rounded = quantize(build("llama"), build_run(tiny("method=rtn", "scheme=channel", "bits=2")), TOKENS)
    assert len(alone.layers) == 14
    errors = [[row["weight_error"] for row in result.layers] for result in (alone, rounded)]
    assert all(one != other for one, other in zip(*errors, strict=True))
