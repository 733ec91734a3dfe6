"""Producers of group inputs, which can absorb a per-channel scale: discovered and proved by measurement.

No family of models is named here. A candidate is a norm whose output is the very tensor that the group reads, or a
linear that ran before the group. `producer_proof` measures.
"""

from __future__ import annotations

import torch
from torch import nn

from harness.calibration import Stream
from harness.core import InputGroup
from harness.quantization.producer_proof import Found, Scratch, bind


class Discovery:
    """Discovers producers in one block and proves them again in every other block of the same structure."""

    def __init__(self) -> None:
        self._producers: dict[tuple[str, ...], Found | None] = {}  # by the linears of the group

    @torch.no_grad()
    def producers(self, probe: Stream, groups: list[InputGroup], prefix: str) -> None:
        """Set `producer` of each group of the block at the probe's position; `prefix` starts its modules' names.

        The producers that earlier blocks have are proved together, on a copy in float32. If this proves less than all,
        each is proved or discovered alone on a copy in float64 (float32 if a kernel lacks float64), because low
        precision may hide a producer or suggest a wrong one.
        """
        block = probe.blocks[probe.position]
        members_of = [tuple(name.removeprefix(prefix) for name in (*group.linears, *group.others)) for group in groups]
        if not self._proved_again(block, probe, members_of):
            self._discover(Scratch(block, probe), members_of)
        for group, members in zip(groups, members_of, strict=True):
            producer = self._producers[members]
            group.producer = bind(block, producer, prefix) if producer else None

    def _proved_again(self, block: nn.Module, probe: Stream, members_of: list[tuple[str, ...]]) -> bool:
        """Whether all groups are known, and the producers of those that have one are proved in this block."""
        if not all(members in self._producers for members in members_of):
            return False
        known = [(producer, members) for members in members_of if (producer := self._producers[members]) is not None]
        return not known or Scratch(block, probe, torch.float32).proves_together(known)

    def _discover(self, scratch: Scratch, members_of: list[tuple[str, ...]]) -> None:
        earlier: list[str] = []
        for members in members_of:
            producer = self._producers.get(members)
            if members not in self._producers or (producer is not None and not scratch.proves(producer, members)):
                self._producers[members] = scratch.find(members, earlier)
            earlier += members
