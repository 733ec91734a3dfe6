"""Operators of the native library: the same loops as in torch, with the same bits, but faster.

Core and methods know nothing of `harness.kernels`, which builds and loads the library. They ask torch for an operator
that it registered, and run their own torch code if there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[..., Any] | None:
    """The operator `ptqbench_native::name`; None if the native library is not loaded, or lacks it."""
    found: Callable[..., Any] | None = getattr(namespace(), name, None)
    return found


def namespace() -> object:
    """torch's operators of the native library; tests replace it by None to run as without the library."""
    return torch.ops.ptqbench_native
