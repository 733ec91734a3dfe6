"""LLM.int8() against its formulas in float64: outliers found, kept apart, and counted where they are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.config.load import build_run
from harness.core.activation import InputQuantizer
from harness.core.qtensor import MixedQTensor, round_to_nearest
from harness.core.scheme import ActivationFormat, Scheme, WeightFormat
from harness.core.stats import MinMax, Stats
from harness.nn.linear import QuantLinear
from methods.llm_int8 import LLMInt8
from tests.conftest import resolve

ROWS = WeightFormat(bits=8, symmetric=True, grid="narrow", scale_dtype="float32")
TOKENS = ActivationFormat(bits=8, symmetric=True, grid="narrow", threshold=6.0)
SCHEME = Scheme(name="llm_int8", weight=ROWS, activation=TOKENS)


def inputs() -> Tensor:
    """Inputs (T, K) of which channel 3 reaches the threshold at one token, and channel 7 always does."""
    seen = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    seen[4, 3], seen[:, 7] = -6.0, 50.0 + torch.arange(10)
    return seen


def weights() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 3, 0.1, 8, 2])[:, None]


def naive_llm_int8(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    """Equation 8, value by value, with int8 weights for the outlier columns too."""
    x, w = x.double(), w.double()
    outliers = [j for j in range(x.shape[1]) if any(abs(float(v)) >= threshold for v in x[:, j])]
    out = torch.zeros(len(x), len(w), dtype=torch.float64)
    for i in range(len(w)):
        weight_scale = max(abs(float(v)) for v in w[i]) / 127
        codes = [round(float(v) / weight_scale) for v in w[i]]
        for t in range(len(x)):
            rest = [0.0 if j in outliers else float(x[t, j]) for j in range(x.shape[1])]
            scale = max(map(abs, rest)) / 127
            whole = sum(round(value / scale) * code for value, code in zip(rest, codes, strict=True))
            out[t, i] = whole * scale * weight_scale + sum(float(x[t, j]) * codes[j] * weight_scale for j in outliers)
    return out


def test_the_layer_is_the_decomposition() -> None:
    quantized = LLMInt8().quantize(weights(), SCHEME, Stats())
    layer = QuantLinear(quantized, None, torch.float32, InputQuantizer(TOKENS)).pack()
    found = layer(inputs()[None])[0].double()
    expected = naive_llm_int8(inputs(), weights(), 6.0)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_outliers_are_kept_exactly_and_have_no_part_in_the_scale_of_the_rest() -> None:
    seen = inputs()
    out = InputQuantizer(TOKENS)(seen[None])[0]
    assert torch.equal(out[:, [3, 7]], seen[:, [3, 7]])
    rest = [j for j in range(16) if j not in (3, 7)]
    steps = seen[:, rest].abs().amax(1) / 127
    assert bool(((out - seen)[:, rest].abs() <= steps[:, None] / 2 * 1.001).all())
    assert not torch.equal(out[:, rest], seen[:, rest])


def test_outliers_of_one_sequence_are_not_another_s() -> None:
    calm = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)
    quantizer = InputQuantizer(TOKENS)
    both = quantizer(torch.cat([inputs()[None], calm]))
    assert torch.equal(both[1:], quantizer(calm))


def test_float16_columns_are_those_that_calibration_saw_and_are_counted() -> None:
    stats = Stats([MinMax], 16)
    stats.update(inputs())
    found = LLMInt8(outlier_weights="float16").quantize(weights(), SCHEME, stats)
    assert isinstance(found, MixedQTensor)
    assert found.columns.tolist() == [3, 7]
    assert torch.equal(found.dequantize()[:, [3, 7]], weights()[:, [3, 7]].half().float())
    plain = round_to_nearest(weights(), ROWS)
    assert torch.equal(found.dequantize()[:, :3], plain.dequantize()[:, :3])
    assert found.stored_bits == plain.stored_bits + 2 * 5 * 16 + 2 * 16


def test_a_scheme_without_a_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scheme=group64 has no activation.threshold.*use scheme=llm_int8"):
        LLMInt8().check(Scheme(name="group64", weight=ROWS))


def test_the_method_brings_its_scheme_and_needs_no_data() -> None:
    cfg = build_run(resolve("method=llm_int8"))
    assert cfg.scheme is not None
    assert cfg.scheme.activation == TOKENS
    assert cfg.steps["llm_int8"].needs == ()


def test_a_threshold_needs_a_dynamic_format() -> None:
    with pytest.raises(ValueError, match="threshold=6.0 with dynamic=False has no meaning"):
        ActivationFormat(bits=8, granularity="tensor", dynamic=False, threshold=6.0)


def test_the_ladder_s_steps_are_what_they_are_called() -> None:
    """Per tensor is the coarsest, then tokens, then rows, then decomposition: on outliers each step helps."""
    seen, weight = inputs(), weights()
    exact = seen.double() @ weight.double().T
    errors = []
    for granularity, tokens, threshold in (
        ("tensor", "tensor", None),
        ("tensor", "token", None),
        ("channel", "token", None),
        ("channel", "token", 6.0),
    ):
        fmt = WeightFormat(bits=8, symmetric=True, grid="narrow", granularity=granularity)  # type: ignore[arg-type]
        rounding = ActivationFormat(bits=8, symmetric=True, grid="narrow", granularity=tokens, threshold=threshold)  # type: ignore[arg-type]
        layer = QuantLinear(round_to_nearest(weight, fmt), None, torch.float32, InputQuantizer(rounding))
        errors.append(float(((layer(seen[None])[0].double() - exact) / weight.norm(dim=1)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
