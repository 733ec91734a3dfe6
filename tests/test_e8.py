"""The lattice codebooks: the points that the paper counts, the nearest of them, and what they cost a Gaussian."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.core import e8
from harness.core.e8 import E8P, SMALL, Codebook

CPU = torch.device("cpu")
BOOKS = {"e8p": E8P, "small": SMALL}


def points(book: Codebook) -> Tensor:
    return book.table(CPU).double() * book.step


def gaussian(count: int, seed: int = 0) -> Tensor:
    return torch.randn(8, count, generator=torch.Generator().manual_seed(seed))


def test_e8p_has_65536_different_points_of_two_shifted_lattices() -> None:
    found = points(E8P)
    assert len(found.unique(dim=0)) == 1 << 16
    for shift, share in ((0.25, found[::2]), (-0.25, found[1::2])):
        lattice = share - shift
        assert torch.equal((2 * lattice) % 2, torch.ones_like(lattice))  # half-odd
        assert torch.equal(lattice.sum(1) % 2, torch.zeros(len(lattice), dtype=torch.float64))


def test_patterns_are_all_up_to_norm_10_and_29_of_norm_12() -> None:
    found = e8.patterns(CPU)
    norms = found.square().sum(1)
    every = [s for s in itertools.product((0.5, 1.5, 2.5, 3.5), repeat=8) if sum(x * x for x in s) <= 10]
    assert len(every) == 227
    assert set(map(tuple, found[norms <= 10].tolist())) == set(every)
    assert norms.unique(return_counts=True)[1].tolist() == [1, 8, 28, 64, 126, 29]
    assert len(found.unique(dim=0)) == 256


def test_the_small_codebook_is_the_shortest_of_e8() -> None:
    found = points(SMALL)
    assert len(found.unique(dim=0)) == 256
    assert found.square().sum(1).unique(return_counts=True)[1].tolist() == [1, 240, 15]
    assert torch.equal(found.sum(1) % 2, torch.zeros(256, dtype=torch.float64))
    whole = (found % 1 == 0).all(1)
    assert bool((whole | (found % 1 == 0.5).all(1)).all())


@given(seed=st.integers(0, 2**31), size=st.floats(0.05, 4.0), name=st.sampled_from(sorted(BOOKS)))
def test_nearest_is_the_nearest_of_all(seed: int, size: float, name: str) -> None:
    book, vectors = BOOKS[name], gaussian(40, seed) * size
    found = book.nearest(vectors)
    best = torch.cdist(vectors.T.double(), points(book)).amin(1)
    torch.testing.assert_close((vectors - found).double().norm(dim=0), best, rtol=1e-6, atol=1e-6)


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
    stored = codes.to(torch.int16 if book.bits > 8 else torch.uint8)  # half of int16's are negative
    assert torch.equal(book.decode(stored.view(-1, 16)).view(-1, 8), decoded)


def test_many_vectors_are_searched_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = gaussian(1000)
    expected = {name: book.nearest(vectors) for name, book in BOOKS.items()}
    monkeypatch.setattr(e8, "_CHUNK", 37)
    assert all(torch.equal(book.nearest(vectors), expected[name]) for name, book in BOOKS.items())


def mean_error(stages: list[tuple[Codebook, float]], count: int = 200_000) -> float:
    """Mean squared error a weight of N(0, 1), each stage with the factor that it magnifies what is left by."""
    left, factor = gaussian(count), 1.0
    for book, more in stages:
        factor *= more
        left = left - book.nearest(left * factor) / factor
    return float(left.square().mean())


def test_a_gaussian_costs_what_the_paper_counts_on() -> None:
    assert mean_error([(E8P, 1.03)]) == pytest.approx(0.0915, rel=0.01)
    assert mean_error([(E8P, 1.03)]) < 0.8 * 0.1175  # of the best scalar code of 2 bits, Lloyd and Max's
    assert mean_error([(E8P, 1.03), (E8P, 3.45)]) == pytest.approx(0.0097, rel=0.01)
    assert mean_error([(E8P, 0.98), (SMALL, 2.04)]) < 0.0345  # Lloyd and Max's of 3 bits


def test_stage_factors_are_the_best_for_a_gaussian() -> None:
    for best, moved in (
        ([(E8P, 1.03)], [[(E8P, 0.95)], [(E8P, 1.11)]]),
        ([(E8P, 1.03), (E8P, 3.45)], [[(E8P, 1.03), (E8P, 3.2)], [(E8P, 1.03), (E8P, 3.7)]]),
        ([(E8P, 0.98), (SMALL, 2.04)], [[(E8P, 0.98), (SMALL, 1.9)], [(E8P, 0.98), (SMALL, 2.2)]]),
    ):
        assert all(mean_error(best) < mean_error(other) for other in moved)
