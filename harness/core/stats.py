"""What a statistic of a linear's inputs is, and those of one group of linears; no batch stays in memory."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="Stat")
T = TypeVar("T")


class Stat(ABC):
    """A statistic of the inputs (T tokens, K) that one input group reads.

    It is created once per input group, with K, and updated batch by batch. A new statistic may be defined in the
    file of the method that needs it.

    cached    its state is exactly the tensors among its attributes: the harness stores them on disk for later runs of
              the same model, data and prefix
    compares  it compares the inputs with those of the float model; it cannot be `cached` then
    weighted  it is a sum of squares, in which a token of weight s counts s times; its inputs are then multiplied by
              sqrt(s) if the run weights tokens (`engine.gradients`)
    """

    cached: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    weighted: ClassVar[bool] = False

    def __init__(self, in_features: int) -> None:
        self.in_features = in_features

    @abstractmethod
    def update(self, inputs: Tensor, reference: Tensor) -> None:
        """Add one batch of inputs (T, K); must not store or change the batch.

        `reference` (T, K) are the inputs of the same tokens in the float model if the statistic `compares`, and
        `inputs` otherwise, or if calibration propagates the float model's activations.
        """

    def rescale(self, scale: Tensor) -> None:
        """Change to the statistic of inputs divided by `scale` (K,); required if the same step has a `transform`."""
        raise NotImplementedError(
            f"{type(self).__name__} does not implement rescale; implement it, or move the transform to a separate step"
        )

    def state(self) -> dict[str, Tensor]:
        """The tensors of the statistic, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def restore(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Restore the tensors of `state` on `device`."""
        vars(self).update({name: value.to(device) for name, value in state.items()})


class Stats:
    """The statistics of one input group, looked up by class: `stats[Hessian]`."""

    def __init__(self, needs: Iterable[type[Stat]] = (), in_features: int = 0) -> None:
        self._stats = {cls: cls(in_features) for cls in needs}
        self._shared: dict[object, tuple[Any, list[Warning | str]]] = {}

    def update(
        self,
        inputs: Tensor,
        reference: Tensor | None = None,
        weights: Tensor | None = None,
        only: Container[type[Stat]] | None = None,
    ) -> None:
        """Update every statistic, or only those of the classes `only`, with one batch of inputs (B, T, K) or (T, K).

        `reference` are the float model's inputs in the same shape; None: `inputs` are. `weights` (T,) are those of the
        tokens, for statistics that are `weighted`; None: all are 1.
        """
        self._shared.clear()
        rows = inputs.reshape(-1, inputs.shape[-1])
        exact = rows if reference is None else reference.reshape(rows.shape)
        factor = None if weights is None else weights.sqrt()[:, None].to(rows)
        for cls, stat in self._stats.items():
            if only is not None and cls not in only:
                continue
            if factor is not None and stat.weighted:
                stat.update(rows * factor, (exact if stat.compares else rows) * factor)
            else:
                stat.update(rows, exact if stat.compares else rows)

    def rescale(self, scale: Tensor) -> None:
        """Change to the statistics of inputs divided by `scale` (K,)."""
        self._shared.clear()
        for stat in self._stats.values():
            stat.rescale(scale)

    def shared(self, key: object, compute: Callable[[], T]) -> T:
        """What `compute` derives from these statistics alone, once for all linears that read this input.

        `key` tells results apart. No linear may change the result; each gets the warnings of its computation.
        """
        if key not in self._shared:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._shared[key] = compute(), [item.message for item in caught]
        result, notes = self._shared[key]
        for note in notes:
            warnings.warn(note, stacklevel=3)
        computed: T = result
        return computed

    def __contains__(self, cls: type[Stat]) -> bool:
        return cls in self._stats

    def __getitem__(self, cls: type[S]) -> S:
        """The statistic of class `cls`.

        Raises: KeyError if the class is not in the method's `needs`.
        """
        stat = self._stats.get(cls)
        if not isinstance(stat, cls):
            raise KeyError(f"{cls.__name__} was not collected; add it to the method's `needs`")
        return stat
