"""Codebooks on the E8 lattice for vectors of 8 weights: E8P with 2^16 points, and one of 2^8 points for its residual.

Paper: Tseng et al. 2024, arXiv 2402.04396, section 4. E8P is a set of points of D8^ + 1/4 and D8^ - 1/4, where D8^ is
the set of vectors of half-odd numbers with an even sum. A point of D8^ is given by its magnitudes, one of 256 patterns,
and its signs, of which 7 are free because the parity of the sum fixes the last one. The 16 bits are, from the highest,

    pattern (8)   signs of coordinates 0 to 6 (7, a set bit is negative)   shift (1, set: - 1/4)

The patterns are all 227 with a squared norm of at most 10, and 29 of those with squared norm 12. The paper lists its
own 29; this module takes the lexicographically first 29 of the 56 patterns with five coordinates 3/2, which are equally
good, because all coordinates of a normal source have the same distribution. The small codebook has the 240 shortest
vectors of E8 (squared norm 2), 15 vectors of squared norm 4, and 0.

The search for the nearest point is exact. For magnitudes a and a pattern s, the score is s a - |s|^2 / 2 if the signs
of the vector have the parity that s requires. If one sign must change, the score is lower by twice the smallest
s_i a_i. If the codebook has every arrangement of a pattern's values, the best arrangement sorts these values like the
magnitudes; the smallest magnitude then gets a 1/2, and its sign is the one that changes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.core.constants import constant
from harness.core.operators import operator

WIDTH = 8  # coordinates of a point
SHIFT = 0.25
_COMPLETE, _PATTERNS = 227, 256  # patterns of squared norm up to 10 (every arrangement exists), and all patterns
_INCOMPLETE_NORM = 12
_CHUNK = 1 << 15  # vectors searched at once: limits memory to about 100 MiB


@functools.lru_cache(maxsize=8)
def patterns(device: torch.device) -> Tensor:
    """Magnitudes (256, 8) of D8^ points, ordered by squared norm; the last 29 are not all patterns of their norm."""
    complete = [s for s in itertools.product((0.5, 1.5, 2.5), repeat=WIDTH) if sum(x * x for x in s) <= 10]
    complete.sort(key=lambda s: sum(x * x for x in s))
    padding = [s for s in itertools.product((0.5, 1.5), repeat=WIDTH) if sum(x * x for x in s) == _INCOMPLETE_NORM]
    return torch.tensor(complete + padding[: _PATTERNS - _COMPLETE], device=device)


@constant
def table(device: torch.device) -> Tensor:
    """All E8P points in the order of their codes, (65536, 8) int8, in units of 1/4: every entry is odd."""
    codes = torch.arange(1 << 16, device=device)
    magnitudes = patterns(device)[codes >> 8]
    negative = (codes[:, None] >> torch.arange(WIDTH - 1, 0, -1, device=device)) & 1
    # The sum must be even: a change of the sign of s_i changes the sum by 2 s_i, which is odd.
    last = (magnitudes.sum(1).long() + negative.sum(1)) % 2
    signs = 1 - 2 * torch.cat([negative, last[:, None]], 1)
    points = magnitudes * signs + torch.where(codes & 1 == 1, -SHIFT, SHIFT)[:, None]
    return (points * 4).to(torch.int8)


def parts(device: torch.device) -> Tensor:
    """E8P as two tables, (512, 8) int8: 256 magnitudes and 256 signs, selected by the upper and lower byte of a code.

    A point is magnitude sign(s) + 1, or - 1 if |s| is 3, in units of 1/4. The signs have an even number of negative
    ones; where the magnitudes have an odd sum, the last magnitude is negative.
    """
    magnitudes = (patterns(device) * 4).to(torch.int8)
    magnitudes[:, -1] *= (1 - 2 * (patterns(device).sum(1).long() % 2)).to(torch.int8)
    low = torch.arange(1 << 8, device=device)
    negative = (low[:, None] >> torch.arange(WIDTH - 1, 0, -1, device=device)) & 1
    signs = 1 - 2 * torch.cat([negative, negative.sum(1, keepdim=True) % 2], 1)
    return torch.cat([magnitudes, (signs * (1 + 2 * (low & 1))[:, None]).to(torch.int8)])


@constant
def small_table(device: torch.device) -> Tensor:
    """The points of the small codebook, (256, 8) int8, in units of 1/2."""
    whole = [p for p in itertools.product((-2, 0, 2), repeat=WIDTH) if sum(map(abs, p)) == 4]
    half = [p for p in itertools.product((-1, 1), repeat=WIDTH) if sum(p) % 4 == 0]
    longer = [tuple(4 * sign * (i == j) for j in range(WIDTH)) for sign in (1, -1) for i in range(WIDTH)][:15]
    return torch.tensor([(0,) * WIDTH, *whole, *half, *longer], dtype=torch.int8, device=device)


def nearest(vectors: Tensor) -> Tensor:
    """The E8P points nearest to `vectors` (8, n) float, coordinates first, in the same shape and dtype."""
    return torch.cat([_nearest(part) for part in vectors.split(_CHUNK, 1)], 1)


def encode(points: Tensor) -> Tensor:
    """Codes (n,) int32 of E8P points (8, n) that `nearest` returned."""
    quarters = (points * 4).round().to(torch.int32)
    minus = quarters[0] % 4 == 1  # 4 times a half-odd number is 2 modulo 4: 3 after + 1/4, 1 after - 1/4
    doubled = (quarters - torch.where(minus, -1, 1)) // 2
    digits = (doubled.abs() - 1) // 2  # 0, 1, 2 for 1/2, 3/2, 5/2
    pattern = _place_of(points.device)[(digits * _base3(points.device)[:, None]).sum(0)]
    bits = torch.arange(WIDTH - 1, 0, -1, device=points.device, dtype=torch.int32)[:, None]
    signs = ((doubled[:-1] < 0).int() << bits).sum(0, dtype=torch.int32)
    return (pattern << 8) | signs | minus.int()


def nearest_small(vectors: Tensor) -> Tensor:
    """The points of the small codebook nearest to `vectors` (8, n), in the same shape and dtype."""
    points = small_table(vectors.device).to(vectors.dtype) / 2
    return points[encode_small(vectors).long()].T


def encode_small(vectors: Tensor) -> Tensor:
    """Codes (n,) int32 of the points of the small codebook nearest to `vectors` (8, n)."""
    points = small_table(vectors.device).to(vectors.dtype) / 2
    offset = -points.square().sum(1, keepdim=True) / 2
    parts = [torch.addmm(offset, points, part).argmax(0) for part in vectors.split(_CHUNK, 1)]
    return torch.cat(parts).int()


def _nearest(vectors: Tensor) -> Tensor:
    native = operator("e8p_nearest")
    if native is not None and vectors.device.type == "cpu" and vectors.dtype == torch.float32:
        device, dtype = vectors.device, vectors.dtype
        points: Tensor = native(vectors, *_multisets(device, dtype), *_incomplete(device, dtype))
        return points
    count = vectors.shape[1]
    shifted = torch.cat([vectors - SHIFT, vectors + SHIFT], 1)
    magnitude, negative = shifted.abs(), shifted < 0
    odd = negative.sum(0) % 2
    best = _best_complete(magnitude, odd)
    _try_incomplete(magnitude, odd, best)
    distance = shifted.square().sum(0) - 2 * best.score
    minus = distance[count:] < distance[:count]
    pattern, changed, negative, odd = (
        torch.where(minus, pair[..., count:], pair[..., :count]) for pair in (best.pattern, best.change, negative, odd)
    )
    signed = torch.where(negative, -pattern, pattern)
    sign = torch.where(odd == pattern.sum(0) % 2, 1, -1)
    return signed.scatter(0, changed, signed.gather(0, changed) * sign) + torch.where(minus, -SHIFT, SHIFT)


@dataclass
class _Best:
    """The best patterns so far for n vectors.

    score    (n,)
    pattern  (8, n)
    change   (1, n) index of the coordinate whose sign changes if the parity requires it
    ordered  (8, n) magnitudes of the vectors, descending
    """

    score: Tensor
    pattern: Tensor
    change: Tensor
    ordered: Tensor


def _best_complete(magnitude: Tensor, odd: Tensor) -> _Best:
    """The best of the 227 complete patterns for each column of `magnitude` (8, n).

    `odd` (n,) is 1 where the number of negative coordinates is odd, else 0. The best arrangement of a pattern's values
    follows the order of the magnitudes, so it is enough to sort the magnitudes and try each multiset of values.
    """
    ordered, order = magnitude.sort(0, descending=True)
    steps, offset, parity = _multisets(magnitude.device, magnitude.dtype)
    base = ordered.sum(0) / 2 - torch.where(odd == parity, 0, ordered[-1:])
    score, kind = (torch.addmm(offset, steps, ordered) + base).max(0)
    values = steps.T[:, kind] + 0.5
    return _Best(score, values.scatter(0, order, values), order[-1:].clone(), ordered)


@functools.lru_cache(maxsize=8)
def _multisets(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The multisets of complete patterns, values descending: values minus 1/2 (7, 8), -|s|^2 / 2 and parity (7, 1)."""
    ordered = patterns(device)[:_COMPLETE].sort(1, descending=True).values.unique(dim=0).to(dtype)
    return ordered - 0.5, -ordered.square().sum(1, keepdim=True) / 2, ordered.sum(1, keepdim=True) % 2


def _try_incomplete(magnitude: Tensor, odd: Tensor, best: _Best) -> None:
    """Replace, in place, the best pattern by the best of the 29 incomplete ones where that has a higher score."""
    points, halves = _incomplete(magnitude.device, magnitude.dtype)
    bound = best.ordered[:5].sum(0) * 1.5 + best.ordered[5:].sum(0) / 2 - _INCOMPLETE_NORM / 2
    columns = (bound > best.score).nonzero()[:, 0]  # few: an upper bound over all arrangements beats the best so far
    candidates = magnitude[:, columns]
    # The smallest 2 s_i a_i: at one of the three 1/2, or at a 3/2 on the smallest magnitude.
    among_halves = candidates[halves.flatten()].unflatten(0, halves.shape).amin(1)
    cost = torch.minimum(among_halves, 3 * best.ordered[-1, columns])
    score, index = (points @ candidates - _INCOMPLETE_NORM / 2 - torch.where(odd[columns] == 1, 0, cost)).max(0)
    better = score > best.score[columns]
    columns, pattern = columns[better], points[index[better]].T
    best.score[columns], best.pattern[:, columns] = score[better], pattern
    best.change[0, columns] = (pattern * magnitude[:, columns]).argmin(0)


@functools.lru_cache(maxsize=8)
def _incomplete(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The incomplete patterns (29, 8), whose sums are odd, and the coordinates of their three 1/2: (29, 3)."""
    points = patterns(device)[_COMPLETE:].to(dtype)
    return points, (points == 0.5).nonzero()[:, 1].view(len(points), -1)


@functools.lru_cache(maxsize=8)
def _place_of(device: torch.device) -> Tensor:
    """Index of each pattern by its digits in base 3, coordinate 0 first: (6561,) int32."""
    places = torch.zeros(3**WIDTH, dtype=torch.int32, device=device)
    digits = (patterns(device) - 0.5).long()
    places[(digits * _base3(device)).sum(1)] = torch.arange(_PATTERNS, dtype=torch.int32, device=device)
    return places


def _base3(device: torch.device) -> Tensor:
    return 3 ** torch.arange(WIDTH - 1, -1, -1, device=device)


@dataclass(frozen=True)
class Codebook:
    """A codebook of 2^`bits` points for 8 weights, with its search.

    table    device -> all points (2^bits, 8) int8, in units of `step`
    nearest  vectors (8, n) -> the nearest points (8, n)
    encode   points (8, n) -> codes (n,) int32
    """

    bits: int
    step: float
    table: Callable[[torch.device], Tensor]
    nearest: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]

    def decode(self, codes: Tensor) -> Tensor:
        """Points in units of `step`, (..., 8) int8, for integer codes (...)."""
        table = self.table(codes.device).view(torch.int64)[:, 0]  # a point's eight int8 are one int64
        index = codes.int() & (1 << self.bits) - 1  # codes may be stored in a signed dtype
        points = table.index_select(0, index.flatten()).view(torch.int8)
        return points.view(*codes.shape, WIDTH)


E8P = Codebook(16, 1 / 4, table, nearest, encode)
SMALL = Codebook(8, 1 / 2, small_table, nearest_small, encode_small)
