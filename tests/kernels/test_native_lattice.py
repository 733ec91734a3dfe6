"""The native search for E8P points chooses the same points as the torch code, also where several are equally near."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.core import operators
from harness.core.formats import lattice
from tests.support.kernels import built

pytestmark = built

VECTORS = {
    "normal": lambda n: torch.randn(8, n),
    "beyond the codebook": lambda n: 4 * torch.randn(8, n),
    "near zero": lambda n: torch.randn(8, n) / 100,
    "zero": lambda n: torch.zeros(8, n),
    "equal magnitudes": lambda n: torch.randint(-14, 15, (8, n)) / 4.0,
    "halfway between points": lambda n: torch.randint(-30, 31, (8, n)) / 8.0,
    "of no row order": lambda n: torch.randn(n, 8).T,
}


@pytest.mark.parametrize("count", [1, 7, 64, 333, 3000])
@pytest.mark.parametrize("kind", VECTORS)
def test_the_points_are_those_of_torch(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors: Tensor = VECTORS[kind](count)
    native = lattice.nearest(vectors)
    monkeypatch.setattr(operators, "namespace", lambda: None)
    assert torch.equal(native, lattice.nearest(vectors))


def test_float64_vectors_keep_their_dtype() -> None:
    vectors = torch.randn(8, 20, dtype=torch.float64)
    assert lattice.nearest(vectors).dtype == torch.float64


def test_no_vectors_have_no_points() -> None:
    operator = operators.operator("e8p_nearest")
    assert operator is not None
    device = torch.device("cpu")
    tables = (*lattice._multisets(device, torch.float32), *lattice._incomplete(device, torch.float32))
    assert operator(torch.zeros(8, 0), *tables).shape == (8, 0)
