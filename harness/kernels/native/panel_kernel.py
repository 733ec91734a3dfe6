"""A weight in panels of output rows; weights that read the same inputs can be joined into one, for one call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from harness.kernels.base import JoinableKernel, Kernel
from harness.kernels.native.panels import PANEL

Tensors = Mapping[str, Tensor | None]


class PanelKernel(JoinableKernel):
    """One weight (N, K); `tensors` are buffers whose first dimension are its panels of 16 rows."""

    def __init__(self, name: str, shape: tuple[int, int], tensors: Tensors) -> None:
        super().__init__(shape)
        self.name = name
        self._by_panels = tuple(tensors)
        for key, tensor in tensors.items():
            self.register_buffer(key, tensor)

    @property
    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """What decides the outputs besides the panels."""

    @abstractmethod
    def of_rows(self, rows: int, tensors: Tensors) -> Self:
        """A kernel with the same settings and `rows` rows in other panels."""

    @classmethod
    def joined(cls, kernels: Sequence[Kernel]) -> Kernel | None:
        same = [kernel for kernel in kernels if isinstance(kernel, cls) and kernel.shape[0] % PANEL == 0]
        if len(same) < len(kernels) or len({kernel._kind() for kernel in same}) > 1:
            return None
        rows = [kernel.shape[0] for kernel in same]
        tensors = {key: _stacked([kernel._buffers[key] for kernel in same]) for key in same[0]._by_panels}
        for key, tensor in tensors.items():
            parts = [None] * len(same) if tensor is None else tensor.split([count // PANEL for count in rows])
            for kernel, part in zip(same, parts, strict=True):
                kernel._buffers[key] = part
        return same[0].of_rows(sum(rows), tensors)

    def _kind(self) -> tuple[Any, ...]:
        """Equal for kernels that can be joined."""
        tensors = [self._buffers[key] for key in self._by_panels]
        return type(self), self.name, self.settings, *(None if t is None else (t.dtype, t.shape[1:]) for t in tensors)


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    """The panels of all weights; None if they have none, and then all have none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
