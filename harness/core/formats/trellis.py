"""Bitshift trellis codes: a sequence of weights is a circle of bits, and each weight a function of a window of them.

A weight takes k bits, and its value is that of the state of L bits which ends with them:

    state_t = (2^k state_{t-1} + bits_t) mod 2^L        1MAD   t = 34038481 s + 76625530 mod 2^32
                                                               value = (sum of the four bytes of t - 510) / 147.8
                                                        3INST  t = 89226354 s + 64248484 mod 2^32
                                                               u = (t & 0x8fff8fff) ^ 0x3b603b60
                                                               value = sum of the two float16 halves of u

Values of consecutive states look like independent draws of a normal distribution. The nearest sequence is found by
Viterbi's algorithm: the best path to a state comes from one of the 2^k states that have its upper L - k bits as their
lower ones. The circle closes because the states before and after its seam share L - k bits, which are taken from the
middle of the best path of the sequence that is turned by half (tail-biting, algorithm 4 of the paper).

Paper: Tseng et al. 2024, arXiv 2406.11235 (QTIP), sections 3.1 to 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core.constants import constant
from harness.core.formats.packing import pack, unpack
from harness.core.operators import operator

LENGTH = 256  # weights of a sequence
Code = Literal["1mad", "3inst"]
_NEVER = 1e30
_COSTS = 2**22  # in memory at once: 16 MiB of float32


@constant
def values(code: Code, state_bits: int, device: torch.device) -> Tensor:
    """The value of each state, (2^state_bits,) float32."""
    states = torch.arange(1 << state_bits, dtype=torch.int64, device=device)
    if code == "1mad":
        mixed = (34038481 * states + 76625530) & 0xFFFFFFFF
        total = sum((mixed >> shift) & 0xFF for shift in (0, 8, 16, 24))
        return ((total - 510) / 147.8).float()  # type: ignore[union-attr]
    mixed = ((89226354 * states + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60
    halves = [((mixed >> shift) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.float16) for shift in (0, 16)]
    return halves[0].float() + halves[1].float()


@dataclass(frozen=True)
class Trellis:
    """A trellis with 2^state_bits states, in which a weight takes `bits`."""

    code: Code
    bits: int
    state_bits: int

    def values(self, device: torch.device) -> Tensor:
        """The value of each state, (2^L,) float32."""
        return values(self.code, self.state_bits, device)

    def pack(self, states: Tensor) -> Tensor:
        """The circles of bits of closed paths (S, 256) int32: (S, 32 bits) uint8."""
        return pack((states & (1 << self.bits) - 1).to(torch.uint8), self.bits).view(len(states), -1)

    def states(self, packed: Tensor) -> Tensor:
        """The paths (S, 256) int32 of circles of bits (S, 32 bits) uint8."""
        new = unpack(packed.reshape(-1), self.bits, (len(packed), LENGTH)).int()
        states = torch.zeros_like(new)
        for step in range(-(-self.state_bits // self.bits)):
            states |= new.roll(step, 1) << self.bits * step
        return states & (1 << self.state_bits) - 1

    def decode(self, packed: Tensor) -> Tensor:
        """The sequences (S, 256) float32 of circles of bits (S, 32 bits) uint8."""
        states = self.states(packed)
        return self.values(packed.device)[states.flatten()].view(states.shape)

    def nearest(self, targets: Tensor) -> Tensor:
        """The closed paths (S, 256) int32 whose values are near `targets` (S, 256) float32."""
        half = targets.shape[1] // 2
        turned = self.path(targets.roll(-half, 1))
        return self.path(targets, turned[:, half] >> self.bits)

    def path(self, targets: Tensor, overlap: Tensor | None = None) -> Tensor:
        """The paths (S, T) int32 whose values are nearest to `targets` (S, T) float32.

        `overlap` (S,) int32 are L - k bits: the upper ones of the first state and the lower ones of the last. None: the
        ends are free.
        """
        native, table = operator("trellis_path"), self.values(targets.device)
        overlap = torch.full((len(targets),), -1, dtype=torch.int32) if overlap is None else overlap
        if native is not None and targets.device.type == "cpu":
            paths: Tensor = native(targets.float().contiguous(), table, self.bits, overlap)
            return paths
        parts = zip(targets.float().split(self._rows), overlap.to(targets.device).split(self._rows), strict=True)
        return torch.cat([self._path(part, table, ends) for part, ends in parts])

    @property
    def _rows(self) -> int:
        return max(1, _COSTS >> self.state_bits)

    def _path(self, targets: Tensor, table: Tensor, overlap: Tensor) -> Tensor:
        """Viterbi's algorithm, for all sequences at once."""
        states, shared = torch.arange(len(table), device=targets.device), len(table) >> self.bits
        free = overlap[:, None] < 0
        starts = free | (states >> self.bits == overlap[:, None])
        costs = torch.where(starts, (targets[:, :1] - table).square(), _NEVER)
        choices = []
        for step in range(1, targets.shape[1]):
            best, choice = costs.view(len(targets), -1, shared).min(1)
            choices.append(choice)
            costs = best.repeat_interleave(1 << self.bits, 1) + (targets[:, step : step + 1] - table).square()
        ends = free | (states & shared - 1 == overlap[:, None])
        last = torch.where(ends, costs, torch.inf).argmin(1, keepdim=True)
        path = [last]
        for choice in reversed(choices):
            lower = path[-1] >> self.bits
            path.append(choice.gather(1, lower) * shared + lower)
        return torch.cat(path[::-1], 1).int()
