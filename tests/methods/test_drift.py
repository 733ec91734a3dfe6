"""Qronos and GPTAQ, column by column in float64 by the formulas of their papers, and what both gain over GPTQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import Drift, Hessian, IntWeight, QTensor, Scheme, Stats
from harness.core.formats import Params
from methods.gptaq import GPTAQ
from methods.gptq import GPTQ
from methods.qronos import Qronos

pytestmark = pytest.mark.usefixtures("torch_kernels")

ROWS, COLUMNS, TOKENS, DAMP, CORRECTION_DAMP = 6, 24, 90, 0.01, 0.03
FORMATS = {
    "group": IntWeight(bits=3, granularity="group", group_size=8),
    "symmetric": IntWeight(bits=4, symmetric=True),
    "tensor": IntWeight(bits=3, granularity="tensor"),
}


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(ROWS, COLUMNS // 8, generator=generator).mul(2).exp().repeat_interleave(8, 1)
    return (torch.randn(ROWS, COLUMNS, generator=generator) * spread * 0.02).double()


def streams(drift: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs of the quantized stream, (T, K) float64, and those of the float stream; the difference is correlated."""
    generator = torch.Generator().manual_seed(2)
    mix, turn = torch.randn(2, COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    exact = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64) @ mix
    noise = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=torch.float64)
    return exact + drift * (exact @ turn / COLUMNS**0.5 + noise), exact


def stats_of(inputs: Tensor, reference: Tensor) -> Stats:
    stats = Stats([Hessian, Drift], COLUMNS)
    for parts in zip(inputs.split([40, 50]), reference.split([40, 50]), strict=True):
        stats.update(*parts)
    return stats


def solve(method: GPTQ, fmt: IntWeight, inputs: Tensor, reference: Tensor) -> QTensor:
    return method.quantize(weights(), Scheme(name="test", weight=fmt), stats_of(inputs, reference))


def grid_of(fmt: IntWeight, weight: Tensor) -> Params:
    """The parameters of each weight, (N, K)."""
    params, (rows, columns) = fmt.weight_params(weight), weight.shape
    return params.map(lambda each: each.expand(rows, -1).repeat_interleave(columns // each.shape[1], 1)[:, :columns])


def round_column(fmt: IntWeight, values: Tensor, params: Params, column: int) -> Tensor:
    return fmt.snap(values.clone(), params.map(lambda each: each[:, column]))


def naive_qronos(fmt: IntWeight, inputs: Tensor, reference: Tensor, order: list[int]) -> Tensor:
    """Each column from the least squares problem that its predecessors leave, solved anew."""
    factor = 2 / TOKENS
    H, G = factor * inputs.T @ inputs, factor * reference.T @ inputs
    added, held = (share * H.diagonal().mean() * torch.eye(COLUMNS) for share in (DAMP, CORRECTION_DAMP))
    target = weights() @ (G + held) @ torch.linalg.inv(H + held)  # argmin |X_f W^T - X_q Q^T|^2, damped towards W
    params, Q = grid_of(fmt, target), torch.zeros_like(target)
    for i in range(COLUMNS):
        done, left = order[:i], order[i:]
        aim = (target @ (H + added))[:, left] - Q[:, done] @ H[done][:, left]
        best = aim @ torch.linalg.inv((H + added)[left][:, left])
        Q[:, left[0]] = round_column(fmt, best[:, 0], params, left[0])
    return Q


def naive_gptaq(fmt: IntWeight, inputs: Tensor, reference: Tensor, order: list[int], alpha: float) -> Tensor:
    """The loop of the authors: the error of a column and its share of the inputs' errors go to later columns."""
    params, factor = grid_of(fmt, weights()), 2 / TOKENS
    H, D = factor * inputs.T @ inputs, factor * (reference - inputs).T @ inputs
    damped = (H + DAMP * H.diagonal().mean() * torch.eye(COLUMNS))[order][:, order]
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    P = alpha * (D[order][:, order] @ U.T).triu(1) @ U
    W, Q = weights()[:, order], torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for i in range(COLUMNS):
        w = W[:, i].clone()
        Q[:, order[i]] = round_column(fmt, w, params, order[i])
        error = (w - Q[:, order[i]]) / U[i, i]
        W[:, i:] -= torch.outer(error, U[i, i:]) - torch.outer(w, P[i, i:])
    return Q


def order_of(inputs: Tensor, act_order: bool) -> list[int]:
    diagonal = inputs.square().sum(0)
    return sorted(range(COLUMNS), key=lambda k: -float(diagonal[k])) if act_order else list(range(COLUMNS))


OPTIONS: list[dict[str, Any]] = [{"act_order": False}, {"act_order": True}, {"column_block": 5}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_qronos_solves_each_column_for_the_float_outputs(name: str, options: dict[str, Any]) -> None:
    inputs, reference = streams()
    method = Qronos(clip=False, damp=DAMP, correction_damp=CORRECTION_DAMP, **options)
    solved = solve(method, FORMATS[name], inputs, reference).dequantize(torch.float64)
    order = order_of(inputs, options.get("act_order", True))
    expected = naive_qronos(FORMATS[name], inputs, reference, order)
    assert not torch.equal(expected, naive_qronos(FORMATS[name], inputs, inputs, order))
    torch.testing.assert_close(solved, expected)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_gptaq_is_the_loop_of_its_authors(name: str, options: dict[str, Any]) -> None:
    inputs, reference = streams()
    method = GPTAQ(clip=False, damp=DAMP, alpha=0.6, **options)
    solved = solve(method, FORMATS[name], inputs, reference).dequantize(torch.float64)
    order = order_of(inputs, options.get("act_order", True))
    expected = naive_gptaq(FORMATS[name], inputs, reference, order, 0.6)
    assert not torch.equal(expected, naive_gptaq(FORMATS[name], inputs, inputs, order, 0.6))
    torch.testing.assert_close(solved, expected)


@pytest.mark.parametrize("method", [Qronos, GPTAQ])
@pytest.mark.parametrize("dynamic", [False, True])
def test_without_drift_both_are_gptq(method: type[GPTQ], dynamic: bool) -> None:
    inputs, _ = streams()
    options: dict[str, Any] = {"static_groups": not dynamic, "damp": DAMP}
    both = [solve(kind(**options), FORMATS["group"], inputs, inputs).dequantize() for kind in (method, GPTQ)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_the_error_of_the_outputs_falls(static: bool, clip: bool) -> None:
    """|X_f W^T - X_q Q^T| of Qronos is less than that of GPTAQ, and that less than that of GPTQ."""
    inputs, reference = streams()
    methods = [kind(clip=clip, static_groups=static, damp=DAMP) for kind in (Qronos, GPTAQ, GPTQ)]
    errors = [
        float(
            (
                reference @ weights().T
                - inputs @ solve(each, FORMATS["group"], inputs, reference).dequantize(torch.float64).T
            ).norm()
        )
        for each in methods
    ]
    assert errors[0] < errors[1] < errors[2]


def test_the_drift_follows_a_rescaling_of_the_inputs() -> None:
    inputs, reference = streams()
    scale = torch.linspace(0.5, 2, COLUMNS, dtype=torch.float64)
    stats = stats_of(inputs, reference)
    stats.rescale(scale)
    expected = stats_of(inputs / scale, reference / scale)[Drift].value
    torch.testing.assert_close(stats[Drift].value, expected)
    torch.testing.assert_close(expected, 2 / TOKENS * ((reference - inputs) / scale).T @ (inputs / scale))
