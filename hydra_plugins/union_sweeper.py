"""A Hydra sweeper for experiments that are no single grid: a list of sweeps.

Hydra finds sweepers in the namespace package hydra_plugins alone, which is why this file is here.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


class UnionSweeper(BasicSweeper):
    """Each of `sweeps` is a line of overrides, comma-separated values included; the command line adds to all."""

    def __init__(self, sweeps: Sequence[str], max_batch_size: int | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size)
        self.sweeps = sweeps

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Batches of jobs, all lines together, so that a launcher may run them side by side."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: list[list[str]] = []
        for line in self.sweeps:
            (own,) = BasicSweeper.split_arguments([*parser.parse_overrides(line.split()), *overrides], None)
            jobs += own
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))
