"""QTIP: block LDLQ with trellis codes against a naive float64 version, its format, and what its states are worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.core import Hessian, Scheme, Stats
from harness.core.formats.trellis import Code, Trellis
from harness.core.formats.trellis_weight import TrellisQTensor
from harness.core.hadamard import random_signs, rotate
from harness.nn import QuantLinear
from methods.qtip import QTIP
from methods.quip_sharp import QuIPSharp

ROWS, COLUMNS, STATES = 32, 64, 9
NONE = Scheme(name="none", weight=None)


def weights() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(ROWS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator).mul(2).exp() * 0.02
    )


def inputs(tokens: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.rand(COLUMNS, generator=generator).mul(2).exp()
    return torch.randn(tokens, COLUMNS, generator=generator) @ mix


def quantized(method: Any = QTIP, **options: Any) -> Any:
    stats = Stats([Hessian], COLUMNS)
    stats.update(inputs())
    settings = {"state_bits": STATES, **options} if method is QTIP else options
    return method(**settings).quantize(weights(), NONE, stats)


def error(decoded: Tensor) -> float:
    exact = weights()
    return float((inputs() @ (decoded - exact).T).norm() / (inputs() @ exact.T).norm())


def naive(bits: int, code: Code, seed: int = 0) -> Tensor:
    """Block LDLQ in float64, one tile after another: L by block elimination."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (random_signs(size, generator).double() for size in (ROWS, COLUMNS))
    V = rotate(rotate(weights().double() * right).T * left).T
    X = rotate(inputs().double() * right)
    H = 2 / len(X) * X.T @ X
    remaining = H + 0.01 * H.diagonal().mean() * torch.eye(COLUMNS)
    L = torch.eye(COLUMNS, dtype=torch.float64)
    for i in range(0, COLUMNS, 16):
        inverse = torch.linalg.inv(remaining[i : i + 16, i : i + 16].clone())
        L[i + 16 :, i : i + 16] = remaining[i + 16 :, i : i + 16] @ inverse
        remaining -= remaining[:, i : i + 16].clone() @ inverse @ remaining[i : i + 16].clone()
    trellis = Trellis(code, bits, STATES)
    table = trellis.values(torch.device("cpu")).double().T
    scale = float(V.square().mean().sqrt() / table.square().mean().sqrt())
    decoded = torch.zeros_like(V)
    for i in reversed(range(0, COLUMNS, 16)):
        target = V[:, i : i + 16] + (V - decoded)[:, i + 16 :] @ L[i + 16 :, i : i + 16]
        for row in range(0, ROWS, 16):
            tile = target[row : row + 16].reshape(1, -1) / scale
            decoded[row : row + 16, i : i + 16] = table[trellis.nearest(tile)[0].long()].reshape(16, 16) * scale
    return decoded


@pytest.mark.parametrize("code", ["1mad", "hyb"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_those_of_the_formulas(bits: int, code: Code) -> None:
    qtensor = quantized(bits=bits, code=code)
    assert isinstance(qtensor, TrellisQTensor)
    V = torch.cat(list(qtensor.slabs(torch.float64))) * qtensor.step
    expected = naive(bits, code)
    assert (V - expected).norm() < 1e-4 * expected.norm()


def test_stored_bits_and_linear() -> None:
    for bits in (2, 3, 4):
        qtensor = quantized(bits=bits)
        assert qtensor.stored_bits == ROWS * COLUMNS * bits + 32 + ROWS + COLUMNS
        x = inputs()[:5]
        expected = x @ qtensor.dequantize().T
        assert (qtensor.linear(x, None) - expected).norm() < 1e-5 * expected.norm()
        packed = QuantLinear(qtensor, None, torch.float32).pack()
        assert (packed(x) - expected).norm() < 1e-5 * expected.norm()


def test_more_states_and_bits_are_more_exact_and_better_than_a_lattice() -> None:
    by_states = [error(quantized(state_bits=count).dequantize()) for count in (8, 12)]
    assert by_states[1] < by_states[0]
    assert by_states[1] < error(quantized(QuIPSharp, bits=2, passes=0, epochs=0).dequantize())
    by_bits = [error(quantized(bits=bits).dequantize()) for bits in (2, 3, 4)]
    assert by_bits[0] > 1.5 * by_bits[1] > 2 * by_bits[2]


def test_sizes_that_are_no_multiple_of_a_tile_are_refused() -> None:
    stats = Stats([Hessian], 40)
    stats.update(torch.randn(50, 40))
    with pytest.raises(ValueError, match="^in_features=40 is not a multiple of 16, the side of a tile; skip"):
        QTIP().quantize(torch.randn(32, 40), NONE, stats)
    with pytest.raises(ValueError, match="^out_features=20 is not a multiple of 16"):
        QTIP().quantize(torch.randn(20, 48), NONE, Stats([Hessian], 48))


@pytest.mark.parametrize("options", [{"bits": 5}, {"state_bits": 17}, {"state_bits": 7}, {"spread": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        QTIP(**options)
