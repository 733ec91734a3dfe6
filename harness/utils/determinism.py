"""The settings with which a run repeats to the bit on the same machine with the same number of threads.

Every random draw comes from a generator with a seed. On a CPU the number of threads, which the record states, fixes the
order of every sum, so nothing has to be set. On a GPU two things would not repeat:

- cuBLAS may choose another algorithm if streams share its workspace. A workspace of fixed size prevents this.
- Sums by index (`index_add_`, in AQLM's codebooks and in k-means) are atomic. torch's deterministic algorithms replace
  them; an operator that has no deterministic algorithm warns and runs.

Timed stages do not use these settings: some deterministic algorithms are slower, and times should be those of the
default algorithms.
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
    """Use only operators that repeat to the bit on `device`; on a CPU, all operators of the harness do so anyway.

    The previous settings are restored at the end, also after an error.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)  # cuBLAS reads it at the first matmul
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
