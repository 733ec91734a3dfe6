"""Keys or values in small floats whose scales were calibrated beforehand, as checkpoints prescribe them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core.formats.params import Params
from harness.core.formats.states_format import FloatStates


@dataclass(frozen=True, kw_only=True)
class CalibratedStates(FloatStates):
    """Codes without stored scales: all tokens have those of the format, and values beyond their range are clipped.

    calibrated  one scale, or one for each head
    """

    calibrated: tuple[float, ...]
    granularity: Literal["token", "channel"] = "token"
    group_size: int = -1

    def coded(self, groups: Tensor, axis: int) -> tuple[Tensor, ...]:
        if len(self.calibrated) not in (1, groups.shape[1]):
            raise ValueError(f"{len(self.calibrated)} calibrated scales for {groups.shape[1]} heads of keys and values")
        return (self.encode(groups, Params(self._scale.to(groups).unsqueeze(axis))),)

    def restored(self, *stored: Tensor) -> Params:
        return Params(self._scale)

    @property
    def _scale(self) -> Tensor:
        return torch.tensor(self.calibrated).view(1, -1, 1, 1)
