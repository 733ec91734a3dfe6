"""Statistics of a linear's input, streamed over calibration batches: no batch is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="Stat")


class Stat(ABC):
    """A statistic of the inputs (T tokens, K) that one input group reads.

    Made once for each input group with K, then updated batch by batch. A new one may live in the
    file of the method that needs it.
    """

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features

    @abstractmethod
    def update(self, inputs: Tensor) -> None:
        """Take in one batch of inputs (T, K); must not keep or change it."""


class MinMax(Stat):
    """Smallest and largest input over all tokens and channels, widened to hold 0.0."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.low = torch.zeros(())
        self.high = torch.zeros(())

    def update(self, inputs: Tensor) -> None:
        low, high = torch.aminmax(inputs)
        self.low = torch.minimum(self.low, low.float().cpu())
        self.high = torch.maximum(self.high, high.float().cpu())


class Stats:
    """The statistics of one input group, looked up by class: `stats[Hessian]`."""

    def __init__(self, needs: Iterable[type[Stat]] = (), in_features: int = 0) -> None:
        self._stats = {cls: cls(in_features) for cls in needs}

    def update(self, inputs: Tensor) -> None:
        """Feed one batch of inputs (B, T, K) or (T, K) to every statistic."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        for stat in self._stats.values():
            stat.update(rows)

    def __getitem__(self, cls: type[S]) -> S:
        """Raises: KeyError that says to add the class to `needs`."""
        stat = self._stats.get(cls)
        if not isinstance(stat, cls):
            raise KeyError(f"{cls.__name__} was not collected; add it to the method's `needs`")
        return stat
