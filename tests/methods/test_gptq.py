"""Compare GPTQ with column-by-column optimal brain quantization and LDLQ in float64; test Hessians without a factor."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.core import Hessian, IntQTensor, IntWeight, QTensor, Scheme, Stats, round_to_nearest
from harness.core.formats import PermutedQTensor
from methods import gptq
from methods.gptq import GPTQ, inverse_factor
from tests.support.reference import FORMATS, Solved, naive_damped, naive_gptq, naive_ldlq

pytestmark = pytest.mark.usefixtures("torch_kernels")

ROWS, COLUMNS = 5, 24


def weights() -> Tensor:
    """Float64 weights; each group has a different range and offset."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) + torch.randn(ROWS, 1, generator=generator)
    spread = torch.rand(ROWS, COLUMNS // 8, generator=generator).mul(3).exp().repeat_interleave(8, 1)
    return (weight * spread * 0.02).double()


def inputs(tokens: int = 60) -> Tensor:
    """Correlated float64 inputs with a few large channels."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator).mul(2).exp()
    return (torch.randn(tokens, COLUMNS, generator=generator) @ mix).double()


def stats_of(X: Tensor) -> Stats:
    stats = Stats([Hessian], X.shape[1])
    stats.update(X)
    return stats


def stats_with(hessian: Tensor) -> Stats:
    """Statistics whose Hessian `value` is `hessian`."""
    stats = Stats([Hessian], len(hessian))
    stats[Hessian].total, stats[Hessian].tokens = hessian / 2, torch.tensor(1)
    return stats


def solve(weight: Tensor, fmt: IntWeight, stats: Stats, **options: Any) -> QTensor:
    """Quantize by the paper's algorithm: without clipping, unless `options` set it."""
    return GPTQ(**{"clip": False, **options}).quantize(weight, Scheme(name="test", weight=fmt), stats)


def hessian_of(X: Tensor) -> Tensor:
    """2/T sum x x^T, one token at a time."""
    total = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64)
    for x in X.double():
        total += torch.outer(x, x)
    return 2 * total / len(X)


def by_diagonal(hessian: Tensor) -> list[int]:
    return sorted(range(len(hessian)), key=lambda j: -float(hessian[j, j]))


def codes_of(quantized: QTensor) -> list[list[int]]:
    assert isinstance(quantized, IntQTensor)
    return quantized.codes.tolist()


def trace_loss(weight: Tensor, decoded: Tensor, hessian: Tensor, damp: float) -> float:
    delta = decoded.double() - weight.double()
    return float((delta @ naive_damped(hessian, damp) * delta).sum())


def test_the_hessian_is_the_sum_over_tokens_in_any_batches() -> None:
    X = inputs()
    stats = Stats([Hessian], COLUMNS)
    for batch in X.split([7, 1, 52]):
        stats.update(batch[None])
    assert (stats[Hessian].value - hessian_of(X)).norm() <= 1e-6 * hessian_of(X).norm()


def test_a_hessian_may_be_read_between_updates() -> None:
    stat, whole = Hessian(300), Hessian(300)  # more than one panel
    X, scale = torch.randn(64, 300), torch.rand(300) + 1
    for batch in X.split(32):
        stat.update(batch, batch)
        whole.update(batch, batch)
        stat.value.zero_()  # a method may change what it reads
    stat.rescale(scale)
    whole.rescale(scale)
    restored = Hessian(300)
    assert not restored.value.any()
    restored.restore(whole.state(), torch.device("cpu"))
    assert torch.equal(stat.value, stat.value.T)
    assert torch.equal(stat.value, whole.value)
    assert torch.equal(stat.value, restored.value)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_those_of_column_by_column(name: str, act_order: bool) -> None:
    weight, hessian = weights(), hessian_of(inputs())
    expected = naive_gptq(weight, hessian, FORMATS[name], 0.01, by_diagonal(hessian) if act_order else None)
    assert expected.codes != round_to_nearest(weight, FORMATS[name]).codes.tolist()
    for block in (1, 8, 128):
        qtensor = solve(weight, FORMATS[name], stats_of(inputs()), act_order=act_order, column_block=block)
        assert codes_of(qtensor) == expected.codes
        assert (qtensor.dequantize().double() - expected.decoded).norm() <= 1e-6 * expected.decoded.norm()


@pytest.mark.parametrize("name", ["group", "float_zero", "full"])
def test_dynamic_groups_take_their_range_from_updated_weights(name: str) -> None:
    weight, hessian = weights(), hessian_of(inputs())
    expected = naive_gptq(weight, hessian, FORMATS[name], 0.01, dynamic_groups=True)
    assert expected.codes != naive_gptq(weight, hessian, FORMATS[name], 0.01).codes
    for block in (1, 8, 12, 128):  # 12 is not a multiple of the group size 8
        options = {"act_order": False, "static_groups": False, "column_block": block}
        assert codes_of(solve(weight, FORMATS[name], stats_of(inputs()), **options)) == expected.codes


def test_dynamic_groups_with_act_order_are_stored_with_the_order() -> None:
    weight, hessian, fmt = weights(), hessian_of(inputs()), FORMATS["group"]
    order = by_diagonal(hessian)
    expected = naive_gptq(weight[:, order], hessian[order][:, order], fmt, 0.01, dynamic_groups=True)
    qtensor = solve(weight, fmt, stats_of(inputs()), static_groups=False)
    assert isinstance(qtensor, PermutedQTensor)
    assert qtensor.order.tolist() == order != sorted(order)
    assert codes_of(qtensor.base) == expected.codes
    assert (qtensor.dequantize().double()[:, order] - expected.decoded).norm() <= 1e-6 * expected.decoded.norm()
    assert qtensor.stored_bits == qtensor.base.stored_bits + 16 * COLUMNS


@pytest.mark.parametrize("name", ["channel", "tensor"])
def test_without_groups_static_groups_has_no_effect(name: str) -> None:
    static, dynamic = (solve(weights(), FORMATS[name], stats_of(inputs()), static_groups=on) for on in (True, False))
    assert codes_of(static) == codes_of(dynamic)


@pytest.mark.parametrize("name", FORMATS)
def test_the_loss_is_the_output_error_and_that_of_ldlq(name: str) -> None:
    weight, hessian, damp = weights(), hessian_of(inputs()), 0.05
    brain: Solved = naive_gptq(weight, hessian, FORMATS[name], damp)
    ldlq = naive_ldlq(weight, hessian, FORMATS[name], damp)
    qtensor = solve(weight, FORMATS[name], stats_of(inputs()), damp=damp, act_order=False)
    assert ldlq.codes == brain.codes == codes_of(qtensor)
    assert ldlq.loss == pytest.approx(brain.loss, rel=1e-9)
    assert trace_loss(weight, qtensor.dequantize(), hessian, damp) == pytest.approx(brain.loss, rel=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_it_beats_rounding_on_what_it_minimises(name: str) -> None:
    weight, hessian, fmt = weights(), hessian_of(inputs()), FORMATS[name]
    nearest = trace_loss(weight, round_to_nearest(weight, fmt).dequantize(), hessian, 0.01)
    for act_order in (True, False):
        qtensor = solve(weight, fmt, stats_of(inputs()), act_order=act_order)
        assert trace_loss(weight, qtensor.dequantize(), hessian, 0.01) < 0.9 * nearest


@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(FORMATS)), act_order=st.booleans(), static=st.booleans())
@settings(max_examples=40)
def test_uncorrelated_inputs_give_round_to_nearest(seed: int, name: str, act_order: bool, static: bool) -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)).double()
    stats = stats_with(torch.eye(16, dtype=torch.float64))
    qtensor = solve(weight, FORMATS[name], stats, act_order=act_order, static_groups=static)
    assert torch.equal(qtensor.dequantize(), round_to_nearest(weight, FORMATS[name]).dequantize())


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_silent_inputs_are_rounded_to_nearest_and_leave_the_others_alone(static: bool, clip: bool) -> None:
    weight, X, fmt = weights(), inputs(), FORMATS["group"]
    silent = [3, 8, 23]
    X[:, silent] = 0
    hessian = hessian_of(X)
    hessian[silent, silent] = hessian.diagonal()[hessian.diagonal() > 0].mean()
    options = {"act_order": False, "static_groups": static, "clip": clip}
    with pytest.warns(UserWarning, match=rf"^3 of {COLUMNS} input channels were silent on the calibration tokens; "):
        qtensor = solve(weight, fmt, stats_of(X), **options)
    assert torch.equal(qtensor.dequantize(), solve(weight, fmt, stats_with(hessian), **options).dequantize())
    if not clip:
        expected = naive_gptq(weight, hessian, fmt, 0.01, dynamic_groups=not static)
        assert codes_of(qtensor) == expected.codes
    scale = qtensor.scale.double().repeat_interleave(COLUMNS // qtensor.scale.shape[1], 1)
    error = (qtensor.dequantize(torch.float64) - weight).abs()
    if static and not clip:  # nearest on the grid of the original weight
        assert (error[:, silent] <= scale[:, silent] / 2 * 1.001).all()


def test_a_weight_whose_inputs_are_all_silent_is_rounded_to_nearest() -> None:
    with pytest.warns(UserWarning, match=rf"^{COLUMNS} of {COLUMNS} input channels .*; the weight is rounded"):
        qtensor = solve(weights(), FORMATS["group"], stats_of(torch.zeros_like(inputs())))
    assert torch.equal(qtensor.dequantize(), round_to_nearest(weights(), FORMATS["group"]).dequantize())


def test_a_singular_hessian_is_damped_more_and_the_warning_says_by_how_much() -> None:
    hessian = torch.ones(COLUMNS, COLUMNS, dtype=torch.float64) * 1e4  # of rank 1
    with pytest.warns(UserWarning, match=r"^damp=1e-18 was raised to 1e-1[0-9] so that the Hessian can be factored$"):
        qtensor = solve(weights(), FORMATS["channel"], stats_with(hessian), damp=1e-18)
    assert torch.isfinite(qtensor.dequantize()).all()


def test_linears_that_read_one_input_share_a_factor_and_its_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(gptq, "inverse_factor", lambda *args: calls.append(args) or inverse_factor(*args))
    stats, other = stats_with(torch.ones(COLUMNS, COLUMNS, dtype=torch.float64) * 1e4), weights().flip(0)
    for weight in (weights(), other):
        with pytest.warns(UserWarning, match="^damp=1e-18 was raised to 1e-1"):
            qtensor = solve(weight, FORMATS["channel"], stats, damp=1e-18)
    assert len(calls) == 1
    alone = stats_with(torch.ones(COLUMNS, COLUMNS, dtype=torch.float64) * 1e4)
    with pytest.warns(UserWarning, match="^damp=1e-18 was raised to 1e-1"):
        assert torch.equal(qtensor.dequantize(), solve(other, FORMATS["channel"], alone, damp=1e-18).dequantize())
    with pytest.warns(UserWarning, match="was raised"):
        solve(other, FORMATS["channel"], alone, damp=1e-17)  # another option
    alone.update(inputs()[None].double())
    solve(other, FORMATS["channel"], alone, damp=1e-2)
    assert len(calls) == 4


def test_an_indefinite_hessian_is_damped_until_it_is_definite() -> None:
    eigenvalues = torch.ones(COLUMNS, dtype=torch.float64)
    eigenvalues[0] = -0.5  # the mean is (23 - 0.5) / 24: damp must exceed 0.53
    Q = torch.linalg.qr(inputs(COLUMNS))[0]
    hessian = Q @ torch.diag(eigenvalues) @ Q.T
    with pytest.warns(UserWarning, match="^damp=0.01 was raised to 1 so that"):
        U = inverse_factor(hessian, 0.01)
    expected = torch.linalg.inv(naive_damped(hessian, 1.0))
    assert (U.T @ U - expected).norm() <= 1e-10 * expected.norm()
    assert torch.equal(U, U.triu())


def test_fewer_tokens_than_inputs_need_no_more_damping() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(weights().float(), FORMATS["channel"], stats_of(inputs(5).float()))


@pytest.mark.parametrize("hessian", [-torch.eye(COLUMNS), torch.full((COLUMNS, COLUMNS), torch.nan)])
def test_a_hessian_without_a_factor_is_refused(hessian: Tensor) -> None:
    with pytest.raises(ValueError, match="^damp=0.01 was raised to 10 and the Hessian is still not positive definite"):
        solve(weights(), FORMATS["channel"], stats_with(hessian.double()))


def test_without_tokens_it_rounds_to_nearest_and_says_so() -> None:
    with pytest.warns(UserWarning, match="no calibration token reached this linear; its weight is rounded to nearest"):
        qtensor = solve(weights(), FORMATS["group"], Stats([Hessian], COLUMNS))
    assert codes_of(qtensor) == round_to_nearest(weights(), FORMATS["group"]).codes.tolist()


@pytest.mark.parametrize("static", [True, False])
def test_clipping_lowers_the_loss(static: bool) -> None:
    weight, hessian, fmt = weights(), hessian_of(inputs()), FORMATS["group"]
    unclipped, clipped = (
        solve(weight, fmt, stats_of(inputs()), clip=on, static_groups=static).dequantize() for on in (False, True)
    )
    assert trace_loss(weight, clipped, hessian, 0.01) < trace_loss(weight, unclipped, hessian, 0.01)


def test_a_dynamic_group_is_clipped_by_its_block_of_the_hessian() -> None:
    weight, fmt, hessian = weights(), FORMATS["group"], hessian_of(inputs())
    for start in range(0, COLUMNS, 8):  # errors of one group do not affect another
        hessian[start : start + 8, :start] = hessian[start : start + 8, start + 8 :] = 0
    static, dynamic = (
        solve(weight, fmt, stats_with(hessian), clip=True, act_order=False, static_groups=on) for on in (True, False)
    )
    assert codes_of(static) == codes_of(dynamic)
    assert torch.equal(static.dequantize(), dynamic.dequantize())


@pytest.mark.parametrize(("key", "value"), [("damp", 0.0), ("damp", -1.0), ("damp", torch.nan), ("column_block", 0)])
def test_options_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{key}={value} is out of range; expected"):
        GPTQ(**{key: value})
