"""Nearest entries of a codebook, and k-means with a weight for every coordinate of every vector.

Lloyd 1982. With weights h, the distance of vector w to entry c is sum_k h_k (w_k - c_k)^2 = const - 2 (h w) c + h c^2,
which is one matrix product for all vectors and entries. The best entry is the weighted mean of its vectors. Vectors are
compared in chunks, so that at most 2^20 distances are in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_DISTANCES = 1 << 20  # in memory at once, 4 MiB
_LANES = 256  # entries that one reduction compares


def smallest(scores: Tensor, count: int = 1) -> Tensor:
    """Indices (n, count) int64 of the smallest `scores` (n, E) float32, in ascending order.

    The scores are overwritten: the index of the entry replaces the last bits of its score, 8 at most, so that a minimum
    also gives its index. This is four times as fast as argmin on a CPU. Scores that agree to 2^-15 of their magnitude
    count as equal.
    """
    entries = scores.shape[1]
    lanes = min(_LANES, 1 << (entries - 1).bit_length())  # a power of two
    scores = F.pad(scores, (0, -entries % lanes), value=torch.finfo(scores.dtype).max) if entries % lanes else scores
    lane = torch.arange(lanes, dtype=torch.int32, device=scores.device)
    blocks = scores.view(len(scores), -1, lanes)
    blocks.view(torch.int32).bitwise_and_(-lanes).bitwise_or_(lane)
    indices = []
    for _ in range(count):
        least, block = blocks.amin(-1).min(1) if blocks.shape[1] > 1 else (blocks.view(-1, lanes).amin(1), 0)
        indices.append((least.view(torch.int32) & lanes - 1).long() + block * lanes)
        if len(indices) < count:
            scores.scatter_(1, indices[-1][:, None], torch.finfo(scores.dtype).max)
    return torch.stack(indices, 1) if count > 1 else indices[0][:, None]


def assign(vectors: Tensor, weights: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `vectors` (n, g), the nearest of `entries` (E, g) by the distance with `weights` (n, g).

    Returns: codes (n,) and distances (n,).
    """
    codes = _nearest(_features(vectors, weights), entries)
    return codes, (weights * (vectors - entries[codes]).square()).sum(1)


def _features(vectors: Tensor, weights: Tensor) -> Tensor:
    """Weighted vectors and weights side by side, (n, 2 g): a distance is their product with (-2 c, c^2)."""
    return torch.cat([vectors * weights, weights], 1)


def _nearest(features: Tensor, entries: Tensor) -> Tensor:
    """Codes (n,) of the nearest of `entries` (E, g)."""
    table = torch.cat([entries * -2, entries.square()], 1).T.contiguous()
    rows = max(_DISTANCES // len(entries), 1)
    return torch.cat([smallest(part @ table)[:, 0] for part in features.split(rows)])


def kmeans(
    vectors: Tensor, weights: Tensor, entries: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Fit a codebook of `entries` entries to `vectors` (n, g) with positive `weights` (n, g).

    The first codebook consists of vectors drawn by `generator` (a CPU generator). An entry without vectors is replaced
    by a vector, drawn with a probability proportional to its distance from its entry. The loop ends early when no code
    changes.
    Returns: entries (E, g), and the code of each vector, (n,).
    """
    picked = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    codebook = vectors[picked[torch.arange(entries, device=vectors.device) % len(vectors)]].clone()
    features = _features(vectors, weights)
    codes = _nearest(features, codebook)
    for _ in range(iterations):
        previous = codes
        codebook = _means(features, codes, entries)
        empty = (torch.bincount(codes, minlength=entries) == 0).nonzero()[:, 0][: len(vectors)]
        if len(empty):
            distances = (weights * (vectors - codebook[codes]).square()).sum(1)
            race = distances / torch.empty(len(vectors)).exponential_(generator=generator).to(distances)
            codebook[empty] = vectors[race.topk(len(empty)).indices]
        codes = _nearest(features, codebook)
        if not len(empty) and torch.equal(codes, previous):
            break
    return codebook, codes


def _means(features: Tensor, codes: Tensor, entries: int) -> Tensor:
    """The weighted mean of each entry's vectors, (E, g); zeros for an entry without vectors."""
    size = features.shape[1] // 2
    sums = features.new_zeros(entries, 2 * size).index_add_(0, codes, features)
    return sums[:, :size] / sums[:, size:].clamp(min=torch.finfo(sums.dtype).tiny)
