"""Salient columns: the choice of columns, float16 columns, scaled columns, and their stored bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.core import AbsMean, IntWeight, Scheme, Stats, round_to_nearest
from harness.core.formats import MixedQTensor, ScaledQTensor
from methods.salient import Salient

FMT = IntWeight(bits=3, granularity="group", group_size=8, scale_dtype="float32")
SCHEME = Scheme(name="test", weight=FMT)
N, K = 6, 32


def weights() -> Tensor:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    weight[:, 20] *= 30  # the column of largest norm
    return weight


def stats() -> Stats:
    X = torch.randn(50, K, generator=torch.Generator().manual_seed(4))
    X[:, 11] *= 40  # the largest input
    X[::2, 5] += 25  # the second largest
    collected = Stats([AbsMean], K)
    collected.update(X)
    return collected


@pytest.mark.parametrize(("choose", "share", "columns"), [("activation", 0.03, [11]), ("activation", 0.05, [5, 11])])
def test_columns_follow_the_inputs(choose: str, share: float, columns: list[int]) -> None:
    qtensor = Salient(choose=choose, share=share).quantize(weights(), SCHEME, stats())  # type: ignore[arg-type]
    assert isinstance(qtensor, MixedQTensor)
    assert qtensor.columns.tolist() == columns


def test_columns_follow_the_weights_without_data() -> None:
    method = Salient(choose="weight", share=0.01)
    assert method.needs == ()
    qtensor = method.quantize(weights(), SCHEME, Stats())
    assert isinstance(qtensor, MixedQTensor)
    assert qtensor.columns.tolist() == [20]


def test_random_columns_are_the_seed_s() -> None:
    def columns(seed: int) -> list[int]:
        qtensor = Salient(choose="random", share=0.2, seed=seed).quantize(weights(), SCHEME, Stats())
        assert isinstance(qtensor, MixedQTensor)
        return qtensor.columns.tolist()

    assert columns(0) == columns(0)
    assert columns(0) != columns(1)
    assert len(set(columns(0))) == 7  # 20 % of 32, rounded up


def test_kept_columns_are_exact_in_float16_and_cost_16_bits_each() -> None:
    weight = weights()
    rounded = round_to_nearest(weight, FMT)
    qtensor = Salient(share=0.03).quantize(weight, SCHEME, stats())
    assert torch.equal(qtensor.dequantize()[:, 11], weight[:, 11].half().float())
    others = [j for j in range(K) if j != 11]
    assert torch.equal(qtensor.dequantize()[:, others], rounded.dequantize()[:, others])
    assert qtensor.bits_per_weight == pytest.approx(rounded.bits_per_weight + (16 * N + 16) / (N * K))


def test_scaled_columns_are_rounded_larger_and_scaled_back() -> None:
    weight = weights()
    qtensor = Salient(share=0.03, scale=2.0).quantize(weight, SCHEME, stats())
    assert isinstance(qtensor, ScaledQTensor)
    scaled = weight.clone()
    scaled[:, 11] *= 2
    expected = round_to_nearest(scaled, FMT).dequantize()
    expected[:, 11] /= 2
    torch.testing.assert_close(qtensor.dequantize(), expected)
    assert (qtensor.dequantize() - round_to_nearest(weight, FMT).dequantize()).norm() > 0


def test_activation_beats_random_and_weight_on_the_output() -> None:
    X = torch.randn(50, K, generator=torch.Generator().manual_seed(4))
    X[:, 11] *= 40
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))

    def error(choose: str) -> float:
        qtensor = Salient(choose=choose, share=0.04).quantize(weight, SCHEME, stats())  # type: ignore[arg-type]
        return float((X @ (qtensor.dequantize() - weight).T).norm())

    assert error("activation") < 0.5 * min(error("random"), error("weight"))


@pytest.mark.parametrize(("option", "message"), [({"share": 0.0}, "share=0.0"), ({"scale": -1.0}, "scale=-1.0")])
def test_options_out_of_range(option: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} is out of range"):
        Salient(**option)  # type: ignore[arg-type]


def test_columns_below_float16_are_refused_unless_the_others_are_larger() -> None:
    wide = Scheme(name="wide", weight=IntWeight(bits=4, scale_dtype="float32"))
    with pytest.raises(ValueError, match="^the largest weight of the float16 columns is .*, below float16's range"):
        Salient(share=0.1).quantize(weights() * 1e-9, wide, stats())
    weight = weights()
    columns = Salient(share=0.1)._columns(weight, stats())
    weight[:, columns] *= 1e-9
    assert torch.isfinite(Salient(share=0.1).quantize(weight, wide, stats()).dequantize()).all()
