"""Adapters of other libraries' matmuls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A peer."""

    name: str
    devices: tuple[str, ...]
    build: Callable[[Tensor, int, torch.dtype], tuple[Callable[[Tensor], Tensor], Callable[[], Tensor], int]]


PEERS: tuple[Peer, ...] = ()
