"""The float model's log probabilities on disk, so that its head runs once for all runs that compare with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.utils.digests import digest, machine
from harness.utils.disk_cache import DiskCache

_TOP = 5
ROWS = 64  # positions whose logits stay in the cache: 12 MiB for a vocabulary of 49152


@dataclass(frozen=True)
class Expected:
    """The float model's predictions at n positions.

    log_probs  (n, V) log probabilities, float32, or float64 if the logits are float64
    top        (n, 5) the likeliest tokens
    """

    log_probs: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Expected:
        """The predictions of logits (n, V)."""
        parts = logits.split(ROWS)
        return cls(torch.cat([log_softmax(part) for part in parts]), torch.cat([likeliest(part) for part in parts]))

    def split(self) -> list[Expected]:
        """A few positions at a time, which stay in the cache."""
        return [Expected(*part) for part in zip(self.log_probs.split(ROWS), self.top.split(ROWS), strict=True)]


class FloatHead:
    """The float model's predictions for slices of positions: read if an earlier run stored them, else computed.

    `decides` are the strings that determine them; the machine and its libraries are added here.
    """

    def __init__(self, cache: DiskCache, decides: Sequence[str]) -> None:
        self.cache, self.key = cache, digest(*decides, *machine())

    def expected(self, index: tuple[int, int], compute: Callable[[], Expected]) -> Expected:
        """The predictions for slice index[1] of window index[0]; what `compute` returns is stored, if there is room."""
        name = digest(self.key, *map(str, index))
        stored = self.cache.load(name) if self.cache.has(name) else None
        if stored is not None:
            return Expected(**stored)
        computed = compute()
        self.cache.save(name, vars(computed))
        return computed


NOTHING_STORED = FloatHead(DiskCache(Path(), 0), ())


def log_softmax(logits: Tensor) -> Tensor:
    """Log probabilities, at least float32, of logits (n, V)."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def likeliest(logits: Tensor) -> Tensor:
    """The five likeliest tokens (n, 5) of logits (n, V); fewer for a smaller vocabulary."""
    return logits.topk(min(_TOP, logits.shape[-1]), dim=-1).indices
