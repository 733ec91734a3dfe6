"""Statistics of a linear's input, streamed over calibration batches: no batch is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="Stat")
_PANEL = 192  # columns of a Hessian that are computed at once


class Stat(ABC):
    """A statistic of the inputs (T tokens, K) that one input group reads.

    Made once for each input group with K, then updated batch by batch. A new one may live in the
    file of the method that needs it. With `cached = True`, tensors among the attributes (and nothing else)
    are its state, which the harness keeps on disk for the next run of the same model, data and prefix.
    """

    cached: ClassVar[bool] = False

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features

    @abstractmethod
    def update(self, inputs: Tensor) -> None:
        """Take in one batch of inputs (T, K); must not keep or change it."""

    def rescale(self, scale: Tensor) -> None:
        """Become the statistic of inputs divided by `scale` (K,); needed with a `transform` in the same step."""
        raise NotImplementedError(
            f"{type(self).__name__} has no rescale; give it one, or make the transform a step of its own"
        )

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Become what `state` was taken from, on `device`."""
        vars(self).update({name: value.to(device) for name, value in state.items()})


class MinMax(Stat):
    """Smallest and largest input of each channel over all tokens, (K,), widened to hold 0.0."""

    cached = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.lows = torch.zeros(in_features)
        self.highs = torch.zeros(in_features)

    def update(self, inputs: Tensor) -> None:
        self.lows = torch.minimum(self.lows.to(inputs.device), inputs.amin(0).float())
        self.highs = torch.maximum(self.highs.to(inputs.device), inputs.amax(0).float())

    def rescale(self, scale: Tensor) -> None:
        self.lows, self.highs = (end.to(scale.device) / scale for end in (self.lows, self.highs))

    @property
    def low(self) -> Tensor:
        return self.lows.amin()

    @property
    def high(self) -> Tensor:
        return self.highs.amax()

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude of each channel, (K,)."""
        return torch.maximum(self.highs, -self.lows)


class AbsMean(Stat):
    """Mean magnitude of each input channel, `value` (K,)."""

    cached = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, inputs: Tensor) -> None:
        self.total = self.total.to(inputs.device) + inputs.abs().sum(0, dtype=torch.float64)
        self.tokens = self.tokens + len(inputs)

    def rescale(self, scale: Tensor) -> None:
        self.total = self.total.to(scale.device) / scale

    @property
    def value(self) -> Tensor:
        return (self.total / self.tokens.clamp(min=1)).float()


class Hessian(Stat):
    """H = 2/T sum x x^T over all T tokens, `value` (K, K) float32: of a linear's squared output error.

    Frantar et al. 2022, arXiv 2210.17323, section 3 (their code averages over sequences, which differs by a factor).
    It is symmetric, so panels right of the diagonal stand for those left of it.
    """

    cached = True

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.total = torch.zeros(in_features, in_features)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def update(self, inputs: Tensor) -> None:
        rows = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        self.total = self.total.to(device=rows.device, dtype=rows.dtype)
        for start in range(0, self.in_features, _PANEL):
            stop = min(start + _PANEL, self.in_features)
            self.total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.tokens = self.tokens + len(inputs)

    def rescale(self, scale: Tensor) -> None:
        self.total = self.total.to(scale.device) / (scale[:, None] * scale)

    @property
    def value(self) -> Tensor:
        upper = self.total.triu()
        return (upper + upper.triu(1).T) * (2.0 / self.tokens.clamp(min=1))


class Sample(Stat):
    """Some inputs of each batch, `rows` of them, evenly spread, (S, K): enough to measure an output error by."""

    cached = True
    rows: ClassVar[int] = 16

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.inputs = torch.zeros(0, in_features)

    def update(self, inputs: Tensor) -> None:
        step = max(1, len(inputs) // self.rows)
        picked = inputs[step // 2 :: step][: self.rows]
        self.inputs = torch.cat([self.inputs.to(picked), picked])

    def rescale(self, scale: Tensor) -> None:
        self.inputs = (self.inputs.to(scale.device) / scale).to(self.inputs.dtype)


class Stats:
    """The statistics of one input group, looked up by class: `stats[Hessian]`."""

    def __init__(self, needs: Iterable[type[Stat]] = (), in_features: int = 0) -> None:
        self._stats = {cls: cls(in_features) for cls in needs}

    def update(self, inputs: Tensor, only: Container[type[Stat]] | None = None) -> None:
        """Feed one batch of inputs (B, T, K) or (T, K) to every statistic, or to those of the classes `only`."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        for cls, stat in self._stats.items():
            if only is None or cls in only:
                stat.update(rows)

    def rescale(self, scale: Tensor) -> None:
        """Become the statistics of inputs divided by `scale` (K,)."""
        for stat in self._stats.values():
            stat.rescale(scale)

    def __contains__(self, cls: type[Stat]) -> bool:
        return cls in self._stats

    def __getitem__(self, cls: type[S]) -> S:
        """Raises: KeyError that says to add the class to `needs`."""
        stat = self._stats.get(cls)
        if not isinstance(stat, cls):
            raise KeyError(f"{cls.__name__} was not collected; add it to the method's `needs`")
        return stat
