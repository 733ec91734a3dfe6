"""A Hydra sweeper that runs a list of sweeps, for experiments that are not a single grid.

This file is in hydra_plugins because Hydra searches only this namespace package for sweepers.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


class UnionSweeper(BasicSweeper):
    """Runs each line of `sweeps`, overrides with comma-separated values; the command line adds to all lines."""

    def __init__(self, sweeps: Sequence[str], max_batch_size: int | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size)
        self.sweeps = sweeps

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Return batches of jobs of all lines together, so that a launcher can run them in parallel."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: list[list[str]] = []
        for line in self.sweeps:
            (line_jobs,) = BasicSweeper.split_arguments([*parser.parse_overrides(line.split()), *overrides], None)
            jobs += line_jobs
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))
