"""What makes a run repeat to the bit on one machine with one thread count.

Every draw comes from a generator with a seed. On a CPU the thread count, which the record holds, fixes the order of
every sum, so nothing is set there. On a GPU two things would not repeat: cuBLAS may take another algorithm where its
workspace is shared between streams, and sums by index (`index_add_`, of AQLM's codebooks and of k-means) are atomic.
The first wants a workspace of fixed size, the second torch's deterministic algorithms; an operator that has none warns
and runs. Timed stages stay outside: some of these algorithms are slower, and times are to be those of the usual ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

_WORKSPACE = ":4096:8"  # eight buffers of 4 MiB; one of the two settings that cuBLAS documents as repeatable


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Hold what runs on `device` to operators that repeat to the bit; on a CPU all that are used do."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)  # read with the first matmul
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
