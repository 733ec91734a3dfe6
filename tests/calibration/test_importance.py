"""Weights of tokens by gradients of the loss: those of the whole model's backward pass, in Hessians alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.calibration import Importance
from harness.core import AbsMean, Drift, Hessian, Method, QTensor, Scheme, Stats, round_to_nearest
from harness.models import Decoder
from harness.utils.disk_cache import DiskCache
from tests.quantization.test_engine import TOKENS, config
from tests.support.decoders import linears, quantize
from tests.support.families import build, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")
Tiny = Callable[..., dict[str, Any]]


def naive_weights(model: Any) -> dict[str, Tensor]:
    """Mean squared gradient over the outputs of each linear, (B, T), by autograd through the whole model."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in linears(model)}
    model.requires_grad_(True)
    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: outputs[name].append(output))
        for name, module in linears(model).items()
    ]
    weights = {name: [] for name in outputs}
    for sequence in TOKENS:
        logits = model(input_ids=sequence[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, sequence[1:])
        slopes = torch.autograd.grad(loss, [calls[-1] for calls in outputs.values()])
        for name, slope in zip(outputs, slopes, strict=True):
            weights[name].append(slope[0].square().mean(-1))
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    return {name: torch.stack(rows) for name, rows in weights.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_weights_are_the_squared_gradients_of_the_loss(family: str) -> None:
    model = uneven(build(family))
    expected = naive_weights(model)
    names = list(linears(model))
    importance = Importance(Decoder(model), TOKENS, names)
    for name in names:
        found = torch.stack([torch.cat(list(importance.of([name], i))) for i in range(len(TOKENS))])
        torch.testing.assert_close(found, expected[name] / expected[name].mean(), rtol=1e-3, atol=1e-4)
        assert float(found.std()) > 0.1
    group = names[:2]
    both = (expected[group[0]] + expected[group[1]]) / 2
    found = torch.stack([torch.cat(list(importance.of(group, i))) for i in range(len(TOKENS))])
    torch.testing.assert_close(found, both / both.mean(), rtol=1e-3, atol=1e-4)


def test_only_sums_of_squares_are_weighted() -> None:
    inputs, reference = torch.randn(2, 20, 4)
    weights = torch.rand(20)
    stats, plain = Stats([Hessian, Drift, AbsMean], 4), Stats([AbsMean], 4)
    stats.update(inputs[None], reference[None], weights)
    plain.update(inputs)
    torch.testing.assert_close(stats[Hessian].value, 2 / 20 * inputs.T @ (weights[:, None] * inputs))
    torch.testing.assert_close(stats[Drift].value, 2 / 20 * (reference - inputs).T @ (weights[:, None] * inputs))
    assert torch.equal(stats[AbsMean].value, plain[AbsMean].value)


@dataclass(frozen=True, kw_only=True)
class Hessians(Method):
    """Records the Hessian of each linear."""

    needs: ClassVar = (Hessian,)
    seen: list[Tensor]

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        self.seen.append(stats[Hessian].value)
        return round_to_nearest(weight, scheme.weight)


def test_a_run_weights_its_hessians(tiny: Tiny) -> None:
    plain, guided = Hessians(seen=[]), Hessians(seen=[])
    quantize(uneven(build("llama")), config(tiny, "scheme=channel", plain=plain), TOKENS)
    quantize(uneven(build("llama")), config(tiny, "scheme=channel", "engine.gradients=true", guided=guided), TOKENS)
    assert len(plain.seen) == len(guided.seen) == 14
    for before, after in zip(plain.seen, guided.seen, strict=True):
        assert (before - after).norm() > 0.05 * before.norm()


def test_statistics_in_the_cache_are_those_of_the_weights(tiny: Tiny, tmp_path: Any) -> None:
    cache = DiskCache(tmp_path, 2**30)
    runs = {}
    for gradients in ("false", "true", "true", "false"):
        method = Hessians(seen=[])
        cfg = config(tiny, "scheme=channel", f"engine.gradients={gradients}", method=method)
        quantize(uneven(build("llama")), cfg, TOKENS, cache=cache)
        runs.setdefault(gradients, []).append(method.seen)
    for first, second in runs.values():
        assert all(map(torch.equal, first, second))
    assert not torch.equal(runs["true"][0][0], runs["false"][0][0])
