"""The contract, for every method in conf/method: a new YAML is tested by being there."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import build_steps
from harness.core.method import Method, overrides
from harness.core.qtensor import IntQTensor, QTensor, round_to_nearest
from harness.core.scheme import Scheme, WeightFormat
from harness.core.stats import Stats
from harness.linear import QuantLinear
from tests.conftest import ROOT, resolve

METHODS = sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml") if path.stem != "none")
COMPOSITES = [name for name in METHODS if "defaults:" in (ROOT / f"conf/method/{name}.yaml").read_text()]
SCHEMES = {
    "channel": WeightFormat(bits=4),
    "group": WeightFormat(bits=3, granularity="group", group_size=16),
    "symmetric": WeightFormat(bits=4, symmetric=True, grid="narrow"),
    "tensor": WeightFormat(bits=8, granularity="tensor"),
}
ROWS, COLUMNS, TOKENS = 24, 32, 200


def steps(method: str) -> dict[str, Method]:
    return build_steps(resolve(f"method={method}")["method"])


def quantizer(method: str) -> Method:
    found = steps(method)
    return next((step for step in found.values() if overrides(step, "quantize")), next(iter(found.values())))


def inputs() -> Tensor:
    """Correlated inputs with a few large channels, as a transformer's are."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator).mul(3).exp()
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mix


def weights() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) * 0.05


def run(method: str, weight: Tensor, scheme: str) -> QTensor:
    step = quantizer(method)
    stats = Stats(step.needs, COLUMNS)
    stats.update(inputs())
    return step.quantize(weight, Scheme(name=scheme, weight=SCHEMES[scheme]), stats)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in COMPOSITES])
def test_yaml_equals_the_dataclass_defaults(method: str) -> None:
    raw: dict[str, Any] = resolve(f"method={method}")["method"]
    for name, step in steps(method).items():
        written = {key: value for key, value in raw[name].items() if key != "_target_"}
        defaults = {
            item.name: item.default_factory() if callable(item.default_factory) else item.default
            for item in dataclasses.fields(step)
        }
        assert written == defaults, f"conf/method/{method}.yaml and {type(step).__name__} have drifted apart"
        assert step.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_module_says_its_paper_and_its_differences(method: str) -> None:
    for step in steps(method).values():
        doc = importlib.import_module(type(step).__module__).__doc__ or ""
        assert re.search(r"^Paper: .*", doc, re.MULTILINE), type(step).__module__
        assert re.search(r"^Differs: .*", doc, re.MULTILINE), type(step).__module__


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_codes_shapes_and_determinism(method: str, scheme: str) -> None:
    weight = weights()
    before = weight.clone()
    first, second = run(method, weight, scheme), run(method, weight, scheme)
    assert torch.equal(weight, before), "quantize must not change the weight"
    assert first.shape == (ROWS, COLUMNS)
    assert first.dequantize().shape == (ROWS, COLUMNS)
    assert first.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(first.dequantize(), second.dequantize())
    if isinstance(first, IntQTensor):
        assert int(first.codes.max()) <= SCHEMES[scheme].max_code
        assert first.scale.shape == SCHEMES[scheme].groups((ROWS, COLUMNS))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["zero", "constant", "outlier", "tiny"])
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_weights_stay_finite(method: str, kind: str, scheme: str) -> None:
    weight = {
        "zero": torch.zeros(ROWS, COLUMNS),
        "constant": torch.full((ROWS, COLUMNS), 0.3),
        "outlier": torch.eye(ROWS, COLUMNS) * 100 + weights(),
        "tiny": weights() * 1e-8,
    }[kind]
    assert torch.isfinite(run(method, weight, scheme).dequantize()).all()


@pytest.mark.parametrize("method", METHODS)
def test_nan_raises(method: str) -> None:
    weight = weights()
    weight[2, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        run(method, weight, "channel")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_output_error_is_no_worse_than_rtn(method: str, scheme: str) -> None:
    weight, seen = weights(), inputs()
    nearest = round_to_nearest(weight, SCHEMES[scheme]).dequantize()
    found = run(method, weight, scheme).dequantize()
    assert (seen @ (found - weight).T).norm() <= (seen @ (nearest - weight).T).norm() * 1.001


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_dequantized_execution(method: str, scheme: str) -> None:
    quantized, seen = run(method, weights(), scheme), inputs()
    packed = QuantLinear(quantized, None, torch.float32).pack()
    torch.testing.assert_close(packed(seen), seen @ quantized.dequantize().T)
    assert sum(buffer.nbytes for buffer in packed.buffers()) * 8 == quantized.stored_bits


def test_hooks_default_to_nothing_and_an_uncollected_statistic_says_so() -> None:
    from harness.core.stats import MinMax

    assert not any(overrides(Method, hook) for hook in ("prepare", "transform", "quantize"))
    with pytest.raises(KeyError, match="MinMax was not collected; add it to the method's `needs`"):
        Stats()[MinMax]
