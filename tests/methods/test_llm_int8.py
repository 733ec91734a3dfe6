"""Compare LLM.int8() with its formulas in float64: outliers are detected, kept as floats, and counted if stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.config import build_run
from harness.core import IntActivation, IntWeight, MinMax, Scheme, Stats, round_to_nearest
from harness.core.formats import InputQuantizer, MixedQTensor
from harness.nn import QuantLinear
from methods.llm_int8 import LLMInt8
from tests.conftest import resolve

ROWS = IntWeight(bits=8, symmetric=True, grid="narrow", scale_dtype="float32")
TOKENS = IntActivation(bits=8, symmetric=True, grid="narrow", threshold=6.0)
SCHEME = Scheme(name="llm_int8", weight=ROWS, activation=TOKENS)


def inputs() -> Tensor:
    """Inputs (T, K); channel 3 reaches the threshold in one token, channel 7 in all tokens."""
    X = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    X[4, 3], X[:, 7] = -6.0, 50.0 + torch.arange(10)
    return X


def weights() -> Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 3, 0.1, 8, 2])[:, None]


def naive_llm_int8(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    """Equation 8, value by value, with int8 weights also for the outlier columns."""
    x, w = x.double(), w.double()
    outliers = [j for j in range(x.shape[1]) if any(abs(float(v)) >= threshold for v in x[:, j])]
    out = torch.zeros(len(x), len(w), dtype=torch.float64)
    for i in range(len(w)):
        weight_scale = max(abs(float(v)) for v in w[i]) / 127
        codes = [round(float(v) / weight_scale) for v in w[i]]
        for t in range(len(x)):
            regular = [0.0 if j in outliers else float(x[t, j]) for j in range(x.shape[1])]
            scale = max(map(abs, regular)) / 127
            int_product = sum(round(value / scale) * code for value, code in zip(regular, codes, strict=True))
            out[t, i] = int_product * scale * weight_scale + sum(
                float(x[t, j]) * codes[j] * weight_scale for j in outliers
            )
    return out


def test_the_layer_is_the_decomposition() -> None:
    quantized = LLMInt8().quantize(weights(), SCHEME, Stats())
    layer = QuantLinear(quantized, None, torch.float32, InputQuantizer(TOKENS)).pack()
    output = layer(inputs()[None])[0].double()
    expected = naive_llm_int8(inputs(), weights(), 6.0)
    assert (output - expected).norm() < 1e-5 * expected.norm()


def test_outliers_stay_exact_and_do_not_affect_the_scale_of_other_channels() -> None:
    X = inputs()
    out = InputQuantizer(TOKENS)(X[None])[0]
    assert torch.equal(out[:, [3, 7]], X[:, [3, 7]])
    others = [j for j in range(16) if j not in (3, 7)]
    steps = X[:, others].abs().amax(1) / 127
    assert bool(((out - X)[:, others].abs() <= steps[:, None] / 2 * 1.001).all())
    assert not torch.equal(out[:, others], X[:, others])


def test_outliers_of_one_sequence_do_not_affect_another() -> None:
    without_outliers = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)
    quantizer = InputQuantizer(TOKENS)
    output = quantizer(torch.cat([inputs()[None], without_outliers]))
    assert torch.equal(output[1:], quantizer(without_outliers))


def test_float16_columns_are_the_outliers_of_calibration_and_are_counted() -> None:
    stats = Stats([MinMax], 16)
    stats.update(inputs())
    qtensor = LLMInt8(outlier_weights="float16").quantize(weights(), SCHEME, stats)
    assert isinstance(qtensor, MixedQTensor)
    assert qtensor.columns.tolist() == [3, 7]
    assert torch.equal(qtensor.dequantize()[:, [3, 7]], weights()[:, [3, 7]].half().float())
    rounded = round_to_nearest(weights(), ROWS)
    assert torch.equal(qtensor.dequantize()[:, :3], rounded.dequantize()[:, :3])
    assert qtensor.stored_bits == rounded.stored_bits + 2 * 5 * 16 + 2 * 16


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
        IntActivation(bits=8, granularity="tensor", dynamic=False, threshold=6.0)


def test_each_step_of_the_ladder_lowers_the_error() -> None:
    """Per tensor, per token, per row, decomposition: with outliers, each step lowers the error."""
    X, weight = inputs(), weights()
    exact = X.double() @ weight.double().T
    errors = []
    for granularity, tokens, threshold in (
        ("tensor", "tensor", None),
        ("tensor", "token", None),
        ("channel", "token", None),
        ("channel", "token", 6.0),
    ):
        fmt = IntWeight(bits=8, symmetric=True, grid="narrow", granularity=granularity)  # type: ignore[arg-type]
        rounding = IntActivation(bits=8, symmetric=True, grid="narrow", granularity=tokens, threshold=threshold)  # type: ignore[arg-type]
        layer = QuantLinear(round_to_nearest(weight, fmt), None, torch.float32, InputQuantizer(rounding))
        errors.append(float(((layer(X[None])[0].double() - exact) / weight.norm(dim=1)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
