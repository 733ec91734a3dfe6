"""The lattice codebooks: the paper's point counts, the search for the nearest point, and the error on a Gaussian."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.core.formats import lattice as e8
from harness.core.formats.lattice import E8P, SMALL, Codebook

CPU = torch.device("cpu")
BOOKS = {"e8p": E8P, "small": SMALL}


def points(book: Codebook) -> Tensor:
    return book.table(CPU).double() * book.step


def gaussian(count: int, seed: int = 0) -> Tensor:
    return torch.randn(8, count, generator=torch.Generator().manual_seed(seed))


def test_e8p_has_65536_different_points_of_two_shifted_lattices() -> None:
    table = points(E8P)
    assert len(table.unique(dim=0)) == 1 << 16
    for shift, half in ((0.25, table[::2]), (-0.25, table[1::2])):
        lattice = half - shift
        assert torch.equal((2 * lattice) % 2, torch.ones_like(lattice))  # half-odd
        assert torch.equal(lattice.sum(1) % 2, torch.zeros(len(lattice), dtype=torch.float64))


def test_patterns_are_all_up_to_norm_10_and_29_of_norm_12() -> None:
    patterns = e8.patterns(CPU)
    norms = patterns.square().sum(1)
    expected = [s for s in itertools.product((0.5, 1.5, 2.5, 3.5), repeat=8) if sum(x * x for x in s) <= 10]
    assert len(expected) == 227
    assert set(map(tuple, patterns[norms <= 10].tolist())) == set(expected)
    assert norms.unique(return_counts=True)[1].tolist() == [1, 8, 28, 64, 126, 29]
    assert len(patterns.unique(dim=0)) == 256


def test_the_small_codebook_has_the_shortest_vectors_of_e8() -> None:
    table = points(SMALL)
    assert len(table.unique(dim=0)) == 256
    assert table.square().sum(1).unique(return_counts=True)[1].tolist() == [1, 240, 15]
    assert torch.equal(table.sum(1) % 2, torch.zeros(256, dtype=torch.float64))
    whole = (table % 1 == 0).all(1)
    assert bool((whole | (table % 1 == 0.5).all(1)).all())


@given(seed=st.integers(0, 2**31), size=st.floats(0.05, 4.0), name=st.sampled_from(sorted(BOOKS)))
def test_nearest_equals_a_search_over_all_points(seed: int, size: float, name: str) -> None:
    book, vectors = BOOKS[name], gaussian(40, seed) * size
    nearest = book.nearest(vectors)
    best = torch.cdist(vectors.T.double(), points(book)).amin(1)
    torch.testing.assert_close((vectors - nearest).double().norm(dim=0), best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vectors", [torch.zeros(8, 3), torch.full((8, 2), 50.0), torch.eye(8) * -9])
@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_ties_and_far_vectors_get_a_point_as_near_as_any(book: Codebook, vectors: Tensor) -> None:
    best = torch.cdist(vectors.T.double(), points(book)).amin(1)
    torch.testing.assert_close((vectors - book.nearest(vectors)).double().norm(dim=0), best)


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_every_code_decodes_to_its_point_and_encodes_back(book: Codebook) -> None:
    codes = torch.arange(1 << book.bits)
    decoded = book.decode(codes)
    assert torch.equal(decoded, book.table(CPU))
    assert torch.equal(book.encode(decoded.float().T * book.step).long(), codes)
    stored = codes.to(torch.int16 if book.bits > 8 else torch.uint8)  # half of the int16 codes are negative
    assert torch.equal(book.decode(stored.view(-1, 16)).view(-1, 8), decoded)


def test_a_search_in_chunks_gives_the_same_points(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = gaussian(1000)
    expected = {name: book.nearest(vectors) for name, book in BOOKS.items()}
    monkeypatch.setattr(e8, "_CHUNK", 37)
    assert all(torch.equal(book.nearest(vectors), expected[name]) for name, book in BOOKS.items())


def mean_error(stages: list[tuple[Codebook, float]], count: int = 200_000) -> float:
    """Mean squared error per weight of N(0, 1); a stage multiplies the residual by all factors so far."""
    residual, factor = gaussian(count), 1.0
    for book, step in stages:
        factor *= step
        residual = residual - book.nearest(residual * factor) / factor
    return float(residual.square().mean())


def test_the_error_on_a_gaussian_is_that_of_the_paper() -> None:
    assert mean_error([(E8P, 1.03)]) == pytest.approx(0.0915, rel=0.01)
    assert mean_error([(E8P, 1.03)]) < 0.8 * 0.1175  # error of the best 2-bit scalar code (Lloyd-Max)
    assert mean_error([(E8P, 1.03), (E8P, 3.45)]) == pytest.approx(0.0097, rel=0.01)
    assert mean_error([(E8P, 0.98), (SMALL, 2.04)]) < 0.0345  # error of the 3-bit Lloyd-Max code


def test_stage_factors_are_the_best_for_a_gaussian() -> None:
    for best, moved in (
        ([(E8P, 1.03)], [[(E8P, 0.95)], [(E8P, 1.11)]]),
        ([(E8P, 1.03), (E8P, 3.45)], [[(E8P, 1.03), (E8P, 3.2)], [(E8P, 1.03), (E8P, 3.7)]]),
        ([(E8P, 0.98), (SMALL, 2.04)], [[(E8P, 0.98), (SMALL, 1.9)], [(E8P, 0.98), (SMALL, 2.2)]]),
    ):
        assert all(mean_error(best) < mean_error(other) for other in moved)


def test_magnitudes_and_signs_make_all_points() -> None:
    codes, parts = torch.arange(1 << 16), e8.parts(torch.device("cpu"))
    magnitudes, signs = parts[codes >> 8], parts[256 + (codes & 255)]
    assert torch.equal(magnitudes * signs.sign() + 2 - signs.abs(), e8.table(torch.device("cpu")))
