"""Learned tables of rows: nearest levels by brute force, means of cells, stored bits, and methods that take them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.core import Hessian, LearnedWeight, Scheme, Stats, round_to_nearest
from harness.core.formats.learned_weight import LearnedQTensor, fit_levels
from methods.awq import AWQ
from methods.gptq import GPTQ

SHAPE = (24, 160)


def weights(seed: int = 0) -> Tensor:
    """Rows in clusters around a few values, which differ from row to row, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(SHAPE[0], 3, generator=generator) * torch.rand(SHAPE[0], 1, generator=generator).mul(3).exp()
    picked = torch.randint(0, 3, SHAPE, generator=generator)
    weight = centres.gather(1, picked) + 0.1 * torch.randn(SHAPE, generator=generator)
    weight[::5, 7] *= 9
    return weight * 0.05


def learned(bits: int = 3) -> LearnedWeight:
    return LearnedWeight(levels="learned", bits=bits)


def grouped(bits: int = 3) -> LearnedWeight:
    return LearnedWeight(levels="learned", bits=bits, granularity="group", group_size=40)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_each_value_is_the_nearest_level_of_its_row(bits: int) -> None:
    weight = weights()
    qtensor = round_to_nearest(weight, learned(bits))
    assert isinstance(qtensor, LearnedQTensor)
    levels = qtensor.levels.double()
    assert levels.shape == (SHAPE[0], 1 << bits)
    assert bool((levels.diff(dim=1) >= 0).all())
    best = (weight.double()[..., None] - levels[:, None]).abs().amin(-1)
    found = (qtensor.dequantize(torch.float64) - weight.double()).abs()
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-7)
    assert torch.equal(levels.gather(1, qtensor.codes.long()).float(), qtensor.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_are_put_on_the_range_of_integers_before_the_levels(bits: int) -> None:
    """Formula by formula, one value at a time, with the stored parameters."""
    weight = weights().double()
    qtensor = round_to_nearest(weight, grouped(bits))
    assert isinstance(qtensor, LearnedQTensor)
    assert qtensor.scale is not None
    assert qtensor.zero_point is not None
    levels, scale, zero = (each.double() for each in (qtensor.levels, qtensor.scale, qtensor.zero_point))
    assert scale.shape == (SHAPE[0], 4)
    groups = weight.view(SHAPE[0], 4, 40)
    expected = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    torch.testing.assert_close(scale, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(zero, -groups.amin(-1) / scale, rtol=2e-3, atol=1e-3)
    decoded = qtensor.dequantize(torch.float64).view(groups.shape)
    for row in range(0, SHAPE[0], 5):
        values = (levels[row] - zero[row][:, None]) * scale[row][:, None]  # (4, 2^bits)
        nearest = (groups[row][..., None] - values[:, None]).abs().amin(-1)
        torch.testing.assert_close((decoded[row] - groups[row]).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_levels_of_groups_are_nearer_than_the_integers_of_the_same_range() -> None:
    from harness.core import IntWeight

    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    integers = IntWeight(bits=3, granularity="group", group_size=40, zero_point="float")
    ours, grid = (float((round_to_nearest(weight, fmt).dequantize() - weight).norm()) for fmt in (grouped(), integers))
    assert ours < 0.95 * grid


def test_levels_are_the_means_of_their_values() -> None:
    rows = weights().double()
    levels = fit_levels(rows, 4)
    for row, table in zip(rows, levels, strict=True):
        codes = (row[:, None] - table).abs().argmin(1)
        for code in codes.unique():
            assert float(row[codes == code].mean()) == pytest.approx(float(table[code]), rel=0.02, abs=1e-3)


def test_snap_is_decode_of_encode() -> None:
    fmt, weight = learned(), weights()
    params = fmt.weight_params(weight).spread()
    groups = fmt.to_groups(weight)
    snapped = fmt.snap(groups, params)
    assert torch.equal(snapped, fmt.decode(fmt.encode(groups, params), params))
    assert torch.equal(fmt.snap(groups, params, out=torch.empty_like(groups)), snapped)
    assert torch.equal(fmt.snap(snapped, params), snapped)


def test_a_table_of_its_own_suits_clustered_rows_better_than_a_grid() -> None:
    from harness.core import IntWeight

    weight = weights()
    ours, grid = (
        float((round_to_nearest(weight, fmt).dequantize() - weight).norm() / weight.norm())
        for fmt in (learned(), IntWeight(bits=3))
    )
    assert ours < 0.6 * grid


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_stored_bits_equal_the_analytic_figure(bits: int) -> None:
    assert round_to_nearest(weights(), grouped(bits)).stored_bits == grouped(bits).stored_bits(SHAPE)
    assert grouped(bits).bits_per_weight((64, 1280)) == pytest.approx(bits + 16 * 2**bits / 1280 + 32 / 40)
    fmt = learned(bits)
    assert round_to_nearest(weights(), fmt).stored_bits == fmt.stored_bits(SHAPE)
    assert fmt.bits_per_weight((64, 1024)) == bits + 16 * 2**bits / 1024
    assert fmt.at(5).bits_per_weight((64, 1024)) == 5.5


def test_the_slabs_of_a_large_weight_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    qtensor = round_to_nearest(weights(), learned())
    expected, inputs = qtensor.dequantize(), torch.randn(3, SHAPE[1])
    monkeypatch.setattr("harness.core.formats.qtensor._SLAB_VALUES", 9 * SHAPE[1])  # slabs of 8 rows
    assert torch.equal(qtensor.dequantize(), expected)
    torch.testing.assert_close(qtensor.linear(inputs, None), inputs @ expected.T)


@pytest.mark.parametrize("value", [0.0, 3.0, -5e-3])
def test_constant_weights_stay_finite_and_close(value: float) -> None:
    for fmt in (learned(), grouped()):
        decoded = round_to_nearest(torch.full(SHAPE, value), fmt).dequantize()
        assert (decoded - value).abs().max() <= 3e-3 * abs(value)


def test_gptq_and_awq_take_it() -> None:
    weight, inputs = weights(), torch.randn(300, SHAPE[1]) @ torch.randn(SHAPE[1], SHAPE[1])
    scheme = Scheme(name="learned", weight=learned())
    rounded = round_to_nearest(weight, learned()).dequantize()
    reference = (inputs @ (rounded - weight).T).norm()
    for method, share in ((GPTQ(), 0.8), (AWQ(), 1.001)):
        stats = Stats([Hessian, *method.needs], SHAPE[1])
        stats.update(inputs)
        found = method.quantize(weight, scheme, stats).dequantize()
        assert (inputs @ (found - weight).T).norm() <= share * reference, type(method).__name__


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="bits=9 is out of range; expected 2 to 8"):
        learned(9)
    with pytest.raises(ValueError, match=r"levels_dtype=float16 cannot hold the levels up to 1e\+06; use .*=float32"):
        round_to_nearest(torch.full((2, 8), 1e6), learned())
    with pytest.raises(ValueError, match=r"levels_dtype=float16 cannot hold the levels up to 5.95e-08; use .*=float32"):
        round_to_nearest(weights() * 1e-8, learned())
    with pytest.raises(ValueError, match="NaN"):
        round_to_nearest(torch.full((2, 8), torch.nan), learned())
