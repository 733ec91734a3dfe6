"""The allocator of the C library: memory of freed tensors is kept for the next ones, not returned to the system."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1  # bytes, the largest value of the parameter
_LARGEST = 2**25  # bytes of the largest tensors that come from the heap: glibc allows no more


def keep_freed_memory() -> None:
    """Let tensors of up to 32 MiB reuse memory that was freed before.

    By default, glibc returns the end of its heap to the system after most operators, and the next operator pays for
    fresh pages: a tenth of the time of a forward on a CPU. Larger blocks, such as weights, are still returned at once.
    Other C libraries have no such function, and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_MMAP_THRESHOLD, _LARGEST)
