"""Nearest entries of a codebook, and k-means with a weight for every coordinate of every vector.

Lloyd 1982. With weights h the distance of vector w to entry c is sum_k h_k (w_k - c_k)^2 = const - 2 (h w) c + h c^2,
one matrix product for all vectors and entries; the best entry is the weighted mean of its vectors. Vectors are
compared some at a time: no more than 2^20 distances are held.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DISTANCES = 1 << 20  # held at once, 4 MiB
_LANES = 256  # entries that one reduction compares


def smallest(scores: Tensor, count: int = 1) -> Tensor:
    """Indices (n, count) int64 of the least `scores` (n, E) float32, least first; E is a power of two. Overwrites them.

    The entry's number takes the place of a score's last bits, 8 at most, which makes a minimum give its place too: four
    times as fast as argmin on a CPU. Scores that agree to 2^-15 of their magnitude count as equal.
    """
    lanes = min(_LANES, scores.shape[1])
    number = torch.arange(lanes, dtype=torch.int32, device=scores.device)
    blocks = scores.view(len(scores), -1, lanes)
    blocks.view(torch.int32).bitwise_and_(-lanes).bitwise_or_(number)
    found = []
    for _ in range(count):
        least, block = blocks.amin(-1).min(1) if blocks.shape[1] > 1 else (blocks.view(-1, lanes).amin(1), 0)
        found.append((least.view(torch.int32) & lanes - 1).long() + block * lanes)
        if len(found) < count:
            scores.scatter_(1, found[-1][:, None], torch.finfo(scores.dtype).max)
    return torch.stack(found, 1) if count > 1 else found[0][:, None]


def assign(vectors: Tensor, weights: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of `entries` (E, g) to each of `vectors` (n, g) under `weights` (n, g).

    Returns: codes (n,) and distances (n,).
    """
    table = torch.cat([entries * -2, entries.square()], 1).T.contiguous()
    features = torch.cat([vectors * weights, weights], 1)
    rows = max(_DISTANCES // len(entries), 1)
    codes = torch.cat([smallest(part @ table)[:, 0] for part in features.split(rows)])
    return codes, (weights * (vectors - entries[codes]).square()).sum(1)


def kmeans(
    vectors: Tensor, weights: Tensor, entries: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Entries (E, g) for `vectors` (n, g) with positive `weights` (n, g), and the code of each vector, (n,).

    It starts from vectors drawn by `generator` (of the CPU). An entry that no vector is nearest to becomes one of the
    vectors, drawn by their distance from their own entry. Ends early when no code changes.
    """
    picked = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    found = vectors[picked[torch.arange(entries, device=vectors.device) % len(vectors)]].clone()
    codes, _ = assign(vectors, weights, found)
    for _ in range(iterations):
        before = codes
        found = _means(vectors, weights, codes, entries)
        empty = (torch.bincount(codes, minlength=entries) == 0).nonzero()[:, 0][: len(vectors)]
        if len(empty):
            distances = (weights * (vectors - found[codes]).square()).sum(1)
            race = distances / torch.empty(len(vectors)).exponential_(generator=generator).to(distances)
            found[empty] = vectors[race.topk(len(empty)).indices]
        codes, _ = assign(vectors, weights, found)
        if not len(empty) and torch.equal(codes, before):
            break
    return found, codes


def _means(vectors: Tensor, weights: Tensor, codes: Tensor, entries: int) -> Tensor:
    """The weighted mean of each entry's vectors, (E, g); zeros where it has none."""
    size = vectors.shape[1]
    both = torch.cat([vectors * weights, weights], 1)
    sums = vectors.new_zeros(entries, 2 * size).index_add_(0, codes, both)
    return sums[:, :size] / sums[:, size:].clamp(min=torch.finfo(sums.dtype).tiny)
