"""Compare QuIP# with a naive float64 version of its formulas, and check its stored format."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import Hessian, IntWeight, Scheme, Stats, round_to_nearest
from harness.core.formats import IncoherentQTensor
from harness.core.formats.incoherent import STAGES
from harness.core.formats.lattice import E8P, SMALL
from harness.core.hadamard import rotate
from harness.core.solvers.block_ldlq import solve
from harness.nn import QuantLinear
from methods.quip_sharp import QuIPSharp

ROWS, COLUMNS = 12, 48
BITS = [2, 3, 4]


NONE = Scheme(name="none", weight=None)


def weights(rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    """Weights with a few large columns and rows."""
    generator = torch.Generator().manual_seed(1)
    column_scale = torch.rand(columns, generator=generator).mul(2).exp()
    return torch.randn(rows, columns, generator=generator) * column_scale * 0.02


def inputs(tokens: int = 200, columns: int = COLUMNS) -> Tensor:
    """Correlated inputs with a few large channels."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator).mul(2).exp()
    return torch.randn(tokens, columns, generator=generator) @ mix


def stats_of(X: Tensor) -> Stats:
    stats = Stats([Hessian], X.shape[1])
    stats.update(X)
    return stats


def quantized(weight: Tensor, bits: int = 2, X: Tensor | None = None, **options: Any) -> IncoherentQTensor:
    stats = stats_of(inputs(columns=weight.shape[1]) if X is None else X)
    qtensor = QuIPSharp(bits=bits, **options).quantize(weight, NONE, stats)
    assert isinstance(qtensor, IncoherentQTensor)
    return qtensor


def loss(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H D^T) of each row."""
    error = (weight - decoded).double()
    return ((error @ hessian.double()) * error).sum(1)


def naive_nearest(vectors: Tensor, step: float) -> Tensor:
    """Nearest E8P points of vectors (n, 8), by comparison with all points."""
    table = E8P.table(torch.device("cpu")).double() / 4 * step
    return table[torch.cdist(vectors, table).argmin(1)]


def naive_ldlq(weight: Tensor, hessian: Tensor, step: float) -> Tensor:
    """Block LDLQ in float64: L by block elimination, then equation 2 from the last block to the first."""
    size, remaining = len(hessian), hessian.double().clone()
    lower = torch.eye(size, dtype=torch.float64)
    for i in range(0, size, 8):
        inverse = torch.linalg.inv(remaining[i : i + 8, i : i + 8].clone())
        lower[i + 8 :, i : i + 8] = remaining[i + 8 :, i : i + 8] @ inverse
        remaining -= remaining[:, i : i + 8].clone() @ inverse @ remaining[i : i + 8].clone()
    decoded, exact = torch.zeros_like(weight, dtype=torch.float64), weight.double()
    for i in reversed(range(0, size, 8)):
        after = slice(i + 8, size)
        target = exact[:, i : i + 8] + (exact - decoded)[:, after] @ lower[after, i : i + 8]
        decoded[:, i : i + 8] = naive_nearest(target, step)
    return decoded


def rounded(vectors: Tensor, step: float) -> Tensor:
    return (E8P.nearest(vectors / step) * step)[None]


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))


def test_ldlq_is_that_of_the_formula() -> None:
    weight, hessian, step = weights(), stats_of(inputs())[Hessian].value, 0.05
    points = solve(weight.T.double(), hessian.double(), 0.01, 0, lambda vectors: rounded(vectors, step), 8)
    expected = naive_ldlq(weight, damped(hessian), step)
    assert not torch.equal(expected, naive_nearest(weight.double().reshape(-1, 8), step).view(weight.shape))
    torch.testing.assert_close(points[0].T, expected)


def test_feedback_and_passes_lower_the_loss_of_every_row() -> None:
    weight, hessian, step = weights(64), damped(stats_of(inputs())[Hessian].value), 0.05
    nearest = naive_nearest(weight.double().reshape(-1, 8), step).view(weight.shape)
    by_passes = [
        loss(weight, solve(weight.T, hessian, 1e-9, passes, lambda vectors: rounded(vectors, step), 8)[0].T, hessian)
        for passes in (0, 1, 3)
    ]
    assert by_passes[0].sum() < 0.9 * loss(weight, nearest, hessian).sum()
    assert bool((by_passes[1] <= by_passes[0] * 1.0001).all())
    assert bool((by_passes[2] <= by_passes[1] * 1.0001).all())
    assert by_passes[1].sum() < 0.99 * by_passes[0].sum()


@pytest.mark.parametrize("bits", BITS)
def test_it_decodes_by_the_formula(bits: int) -> None:
    qtensor = quantized(weights(), bits)
    point = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for book, codes, scale in zip(STAGES[bits], qtensor.codes, qtensor.scale, strict=True):
        index = codes.long() & (1 << book.bits) - 1
        point += (book.table(torch.device("cpu")).double()[index] * book.step).flatten(1) * float(scale)
    left, right = (
        torch.tensor([1 - 2 * int(packed[i // 8] >> i % 8 & 1) for i in range(count)], dtype=torch.float64)
        for packed, count in ((qtensor.left, ROWS), (qtensor.right, COLUMNS))
    )
    q_rows, q_columns = (rotate(torch.eye(size, dtype=torch.float64)) for size in (ROWS, COLUMNS))
    expected = torch.diag(left) @ q_rows @ point @ q_columns.T @ torch.diag(right)
    assert {-1.0, 1.0} == set(left.tolist()) == set(right.tolist())
    torch.testing.assert_close(qtensor.dequantize(torch.float64), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(12, 48), (7, 24), (33, 72), (5, 8)])
@pytest.mark.parametrize("bits", BITS)
def test_the_online_transform_multiplies_by_what_it_decodes_to(bits: int, rows: int, columns: int) -> None:
    qtensor, X, bias = quantized(weights(rows, columns), bits), inputs(9, columns).view(3, 3, -1), torch.randn(rows)
    expected = X.double() @ qtensor.dequantize(torch.float64).T + bias.double()
    assert (qtensor.linear(X, bias) - expected).norm() < 1e-5 * expected.norm()
    for dtype, close in ((torch.float64, 1e-12), (torch.bfloat16, 0.02), (torch.float16, 0.003)):
        small = X / 8
        error = qtensor.linear(small.to(dtype), None).double() - small.double() @ qtensor.dequantize(torch.float64).T
        assert error.norm() < close * (small.double() @ qtensor.dequantize(torch.float64).T).norm()


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_those_of_codes_signs_and_scales(bits: int) -> None:
    rows, columns = 64, 96
    qtensor = quantized(weights(rows, columns), bits)
    assert qtensor.stored_bits == bits * rows * columns + rows + columns + 32 * len(STAGES[bits])


def test_more_bits_cost_less_and_two_beat_two_bit_rounding() -> None:
    weight, X = weights(96, 192), inputs(800, 192)
    hessian = stats_of(X)[Hessian].value
    cost = [float(loss(weight, quantized(weight, bits, X).dequantize(), hessian).sum()) for bits in BITS]
    group = IntWeight(bits=2, granularity="group", group_size=64)
    rounding_loss = float(loss(weight, round_to_nearest(weight, group).dequantize(), hessian).sum())
    assert cost[0] < 0.3 * rounding_loss
    assert cost[1] < 0.45 * cost[0]
    assert cost[2] < 0.45 * cost[1]


def test_rotation_makes_outliers_harmless() -> None:
    weight = weights(96, 192)
    spiked = weight.clone()
    spiked[3, 5] = weight.norm()  # as much energy as all other weights together
    identity = torch.eye(192)
    plain_error, spiked_error = (
        (quantized(matrix, 2, identity).dequantize() - matrix).norm() / matrix.norm() for matrix in (weight, spiked)
    )
    assert spiked_error < 1.05 * plain_error


def test_the_seed_decides_the_signs_and_all_else_is_fixed() -> None:
    first, again, other = (quantized(weights(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.dequantize(), again.dequantize())
    assert not torch.equal(first.right, other.right)


def test_the_tuner_decodes_as_stored_and_stores_the_tuned_values() -> None:
    qtensor, X = quantized(weights(), 3), inputs(6)
    tuner = qtensor.tuner()
    torch.testing.assert_close(tuner.weight(tuner.values), qtensor.dequantize())
    values = {
        name: (value * (1 + 0.1 * torch.rand_like(value))).requires_grad_() for name, value in tuner.values.items()
    }
    tuner.weight(values).square().sum().backward()  # type: ignore[no-untyped-call]
    assert tuner.linear is not None
    torch.testing.assert_close(tuner.linear(values, X), X @ tuner.weight(values).T, rtol=1e-4, atol=1e-4)
    assert all(value.grad is not None and bool((value.grad != 0).all()) for value in values.values())
    tuner.accept({name: value.detach() for name, value in values.items()})
    expected = tuner.weight({name: value.detach().half().float() for name, value in values.items()})
    torch.testing.assert_close(qtensor.dequantize(), expected)
    torch.testing.assert_close(qtensor.linear(X, None), X @ expected.T, rtol=1e-4, atol=1e-4)
    assert qtensor.stored_bits == 3 * ROWS * COLUMNS + 16 * (ROWS + COLUMNS) + 64


def test_a_copy_packs_and_moves() -> None:
    qtensor, X = quantized(weights()), inputs(4)
    linear = QuantLinear(copy.deepcopy(qtensor), None, torch.float64).pack()  # no kernel of float64
    assert linear.kernel == "e8p"
    torch.testing.assert_close(linear(X), qtensor.linear(X, None))
    assert sum(buffer.nbytes for buffer in linear.to("meta").buffers()) * 8 == qtensor.stored_bits


def test_without_tokens_all_inputs_get_equal_weight_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="^no calibration token reached this linear; all its inputs get equal weight$"):
        qtensor = QuIPSharp().quantize(weights(), NONE, Stats([Hessian], COLUMNS))
    assert torch.equal(qtensor.dequantize(), quantized(weights(), 2, torch.eye(COLUMNS) * 3).dequantize())


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="scheme=group64 is another format than lattice codes; use scheme=none"):
        QuIPSharp().check(Scheme(name="group64", weight=IntWeight(bits=2)))
    with pytest.raises(ValueError, match=r"bits=5 is out of range for lattice codes; expected one of \[2, 3, 4\]"):
        QuIPSharp(bits=5)
    with pytest.raises(ValueError, match="in_features=20 is not a multiple of 8, the weights of one code; skip this"):
        quantized(weights(8, 20))
    for key, value in (("damp", 0.0), ("spread", -1.0), ("lr", 0.0), ("passes", -1), ("epochs", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"^{key}={value} is out of range; expected"):
            QuIPSharp(**{key: value})  # type: ignore[arg-type]


def test_zeros_decode_to_almost_zero_and_tiny_weights_as_others() -> None:
    assert quantized(torch.zeros(ROWS, COLUMNS)).dequantize().abs().max() < 1e-29
    weight = weights()
    plain, tiny = (quantized(weight * factor).dequantize() / factor for factor in (1, 2.0**-45))
    assert (tiny - plain).norm() < 0.1 * (plain - weight).norm()


def test_the_small_codebook_is_stored_in_a_byte() -> None:
    qtensor = quantized(weights(), 3)
    assert [stage_codes.dtype for stage_codes in qtensor.codes] == [torch.int16, torch.uint8]
    assert int(qtensor.codes[1].max()) < 1 << SMALL.bits
