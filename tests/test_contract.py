"""The contract, tested for every method in conf/method; a new YAML file there is tested automatically."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import build, build_steps
from harness.core import (
    ActivationFormat,
    IntQTensor,
    Method,
    QTensor,
    Scheme,
    Stats,
    WeightFormat,
    overrides,
    round_to_nearest,
)
from harness.nn import QuantLinear
from tests.conftest import ROOT, resolve

METHODS = sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml") if path.stem != "none")
COMPOSITES = [name for name in METHODS if "_target_:" not in (ROOT / f"conf/method/{name}.yaml").read_text()]
INT8_TOKENS = ActivationFormat(bits=8, symmetric=True, grid="narrow", threshold=6.0)
SCHEMES = {
    "channel": Scheme(name="channel", weight=WeightFormat(bits=4)),
    "group": Scheme(name="group", weight=WeightFormat(bits=3, granularity="group", group_size=16)),
    "float_zero": Scheme(
        name="float_zero", weight=WeightFormat(bits=3, granularity="group", group_size=16, zero_point="float")
    ),
    "symmetric": Scheme(name="symmetric", weight=WeightFormat(bits=4, symmetric=True, grid="narrow")),
    "tensor": Scheme(name="tensor", weight=WeightFormat(bits=8, granularity="tensor")),
    "llm_int8": Scheme(
        name="llm_int8", weight=WeightFormat(bits=8, symmetric=True, grid="narrow"), activation=INT8_TOKENS
    ),
    "native": Scheme(name="native", weight=WeightFormat(bits=4)),
    "native_2": Scheme(name="native", weight=WeightFormat(bits=2)),
}
ROWS, COLUMNS, TOKENS = 24, 64, 200


@functools.cache
def steps(method: str) -> dict[str, Method]:
    return build_steps(resolve(f"method={method}")["method"])


def quantizer(method: str) -> Method:
    """The first step of a method that overrides `quantize`, or else its first step."""
    candidates = steps(method)
    return next((step for step in candidates.values() if overrides(step, "quantize")), next(iter(candidates.values())))


def inputs() -> Tensor:
    """Correlated inputs with a few large channels, like those of a transformer."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator).mul(3).exp()
    return torch.randn(TOKENS, COLUMNS, generator=generator) @ mix


def weights() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) * 0.05


def accepts(method: str, scheme: str) -> bool:
    try:
        quantizer(method).check(SCHEMES[scheme])
    except ValueError:
        return False
    return True


def run(method: str, weight: Tensor, scheme: str) -> QTensor:
    """Quantize; skips the test where the method refuses the scheme."""
    if not accepts(method, scheme):
        pytest.skip(f"{method} refuses scheme={scheme}")
    step = quantizer(method)
    stats = Stats(step.needs, COLUMNS)
    stats.update(inputs())
    return step.quantize(weight, SCHEMES[scheme], stats)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in COMPOSITES])
def test_yaml_equals_the_dataclass_defaults(method: str) -> None:
    raw: dict[str, Any] = resolve(f"method={method}")["method"]
    for name, step in steps(method).items():
        written = {key: value for key, value in raw[name].items() if key != "_target_"}
        defaults = {
            item.name: item.default_factory() if callable(item.default_factory) else item.default
            for item in dataclasses.fields(step)
        }
        assert written == defaults, f"conf/method/{method}.yaml and {type(step).__name__} differ"
        assert step.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_module_docstring_names_paper_and_differences(method: str) -> None:
    for step in steps(method).values():
        doc = importlib.import_module(type(step).__module__).__doc__ or ""
        assert re.search(r"^Paper: .*", doc, re.MULTILINE), type(step).__module__
        assert re.search(r"^Differs: .*", doc, re.MULTILINE), type(step).__module__


@pytest.mark.parametrize("method", METHODS)
def test_accepts_one_of_these_schemes_and_the_scheme_of_its_yaml(method: str) -> None:
    assert any(accepts(method, scheme) for scheme in SCHEMES)
    resolved = resolve(f"method={method}")
    for step in build_steps(resolved["method"]).values():
        step.check(build(Scheme, resolved["scheme"], "scheme"))


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
        assert int(first.codes.max()) <= SCHEMES[scheme].weight.max_code
        assert first.scale.shape == SCHEMES[scheme].weight.groups((ROWS, COLUMNS))


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
        run(method, weight, next(scheme for scheme in SCHEMES if accepts(method, scheme)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_output_error_is_no_worse_than_rtn(method: str, scheme: str) -> None:
    """A method without input statistics is compared by its weight error |W - W'|, others by their output error."""
    if type(quantizer(method)).__module__.startswith("methods.peers."):
        pytest.skip("a peer defines its own grid")
    if scheme == "native":
        pytest.skip("the method defines its own format; the weight format of `native` is a placeholder")
    weight, samples = weights(), inputs()
    nearest = round_to_nearest(weight, SCHEMES[scheme].weight).dequantize()
    decoded = run(method, weight, scheme).dequantize()
    if not quantizer(method).needs:
        assert (decoded - weight).abs().mean() <= (nearest - weight).abs().mean() * 1.001
        return
    assert (samples @ (decoded - weight).T).norm() <= (samples @ (nearest - weight).T).norm() * 1.001


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_dequantized_execution(method: str, scheme: str) -> None:
    quantized, samples = run(method, weights(), scheme), inputs() / 40  # some channels above the threshold, some below
    packed = QuantLinear(quantized, None, torch.float32).pack()
    expected = samples @ quantized.dequantize().T
    if quantized.quantizes_inputs:
        assert (packed(samples) - expected).norm() <= 0.02 * expected.norm()
    else:
        torch.testing.assert_close(packed(samples), expected)
    assert sum(buffer.nbytes for buffer in packed.buffers()) * 8 == quantized.stored_bits


def test_hooks_default_to_nothing_and_a_missing_statistic_is_an_error() -> None:
    from harness.core import MinMax

    assert not any(overrides(Method, hook) for hook in ("prepare", "rotate", "transform", "quantize"))
    with pytest.raises(KeyError, match="MinMax was not collected; add it to the method's `needs`"):
        Stats()[MinMax]
