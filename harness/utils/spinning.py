"""How long threads spin that wait for others. Imports nothing, because it must run before torch is imported."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Let threads that wait for others sleep after about 0.1 ms; OpenMP reads this once, when torch is imported.

    By default they spin for milliseconds, which costs more than it saves as soon as another process, or the threads of
    another library, need a core. Waits between the small operators of one token are shorter, so latency stays the same.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "10000"
