"""k-means with weights, against loops over vectors and entries, and on vectors made from a known codebook."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.core.solvers import kmeans
from harness.core.solvers.kmeans import assign, smallest


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    entries=st.integers(1, 11).map(lambda power: 1 << power) | st.integers(2, 1500),
    rows=st.integers(1, 9),
    count=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
def test_smallest_is_argmin_unless_scores_are_nearly_equal(entries: int, rows: int, count: int, seed: int) -> None:
    scores = torch.randn(rows, entries, generator=generator(seed))
    indices = smallest(scores.clone(), count)
    assert indices.shape == (rows, count)
    assert count == 1 or bool((indices[:, 0] != indices[:, 1]).all())
    least = scores.topk(count, largest=False).values
    torch.testing.assert_close(scores.gather(1, indices), least, rtol=2**-14, atol=1e-6)


@pytest.mark.parametrize("held", [1, 7 * 16, 1 << 20])
def test_the_nearest_entry_is_that_of_a_loop(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_DISTANCES", held)
    vectors, entries = torch.randn(40, 3, generator=generator()), torch.randn(16, 3, generator=generator(1))
    weights = torch.rand(40, 3, generator=generator(2)) ** 3 + 1e-3
    codes, distances = assign(vectors, weights, entries)
    for i in range(40):
        costs = [float((weights[i] * (vectors[i] - entry).square()).sum()) for entry in entries]
        assert costs[int(codes[i])] <= min(costs) * 1.001
        assert float(distances[i]) == pytest.approx(costs[int(codes[i])], rel=1e-5)


def test_weights_decide_the_nearest_entry_and_the_mean() -> None:
    vectors = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    weights = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    codebook, codes = kmeans.kmeans(vectors, weights, 1, 5, generator())
    torch.testing.assert_close(codebook, torch.tensor([[0.0, 2.5]]))
    assert codes.tolist() == [0, 0]
    entries = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert assign(torch.zeros(1, 2), torch.tensor([[9.0, 1.0]]), entries)[0].tolist() == [1]
    assert assign(torch.zeros(1, 2), torch.tensor([[1.0, 9.0]]), entries)[0].tolist() == [0]


@pytest.mark.parametrize("seed", range(4))
def test_planted_entries_are_recovered(seed: int) -> None:
    planted = torch.randn(32, 8, generator=generator(seed))
    labels = torch.randint(0, 32, (600,), generator=generator(seed + 10))
    vectors = planted[labels]
    codebook, codes = kmeans.kmeans(vectors, torch.ones_like(vectors), 32, 50, generator(seed + 20))
    assert float((codebook[codes] - vectors).abs().max()) <= 1e-5
    assert len(set(codes.tolist())) == len(set(labels.tolist()))


def test_more_entries_than_vectors_and_equal_vectors() -> None:
    few = torch.randn(5, 4, generator=generator())
    codebook, codes = kmeans.kmeans(few, torch.ones_like(few), 16, 10, generator())
    torch.testing.assert_close(codebook[codes], few)
    same = torch.full((20, 4), 0.3)
    codebook, codes = kmeans.kmeans(same, torch.ones_like(same), 8, 10, generator())
    torch.testing.assert_close(codebook[codes], same)
    assert torch.isfinite(codebook).all()
