"""A Hydra sweeper for experiments that are no single grid: a list of sweeps, run one after another.

Hydra finds sweepers in the namespace package hydra_plugins alone, which is why this file is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class UnionSweeper(BasicSweeper):
    """Each of `sweeps` is a line of overrides, comma-separated values included; the command line adds to all."""

    def __init__(self, sweeps: Sequence[str], max_batch_size: int | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size)
        self.sweeps = sweeps

    def sweep(self, arguments: list[str]) -> Any:
        returns = []
        for line in self.sweeps:
            self.batch_index = 0
            returns += super().sweep([*line.split(), *arguments])
        return returns
