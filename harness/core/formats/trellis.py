"""Bitshift trellis codes: a sequence of weights is a circle of bits, and each weight a function of a window of them.

A step takes b bits for V weights, and their values are those of the state of L bits which ends with these bits:

    state_t = (2^b state_{t-1} + bits_t) mod 2^L        1MAD   t = 34038481 s + 76625530 mod 2^32
                                                        V = 1  value = (sum of the four bytes of t - 510) / 147.8
                                                        3INST  t = 89226354 s + 64248484 mod 2^32
                                                        V = 1  u = (t & 0x8fff8fff) ^ 0x3b603b60
                                                               value = sum of the two float16 halves of u
                                                        HYB    t = s^2 + s mod 2^32
                                                        V = 2  values = pair of bits 6 to 14 of t, in a table;
                                                               the second is negative if bit 15 is 1

Values of consecutive states look like independent draws of a normal distribution. The nearest sequence is found by
Viterbi's algorithm: the best path to a state comes from one of the 2^b states that have its upper L - b bits as their
lower ones. The circle closes because the states before and after its seam share L - b bits. They are taken from a
path of the values around the seam, which is found first (tail-biting; algorithm 4 of the paper finds that of the whole
sequence, turned by half).

Paper: Tseng et al. 2024, arXiv 2406.11235 (QTIP), sections 3.1 to 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.core.constants import constant
from harness.core.formats.hyb_table import INDEX_BITS, pairs
from harness.core.formats.packing import pack, unpack
from harness.core.operators import operator

LENGTH = 256  # weights of a sequence
REACH = 64  # weights on either side of the seam that choose the bits which close the circle
Code = Literal["1mad", "3inst", "hyb"]
_NEVER = 1e30
_COSTS = 2**22  # in memory at once: 16 MiB of float32


@constant
def values(code: Code, state_bits: int, device: torch.device) -> Tensor:
    """The values of each state, (V, 2^state_bits) float32."""
    states = torch.arange(1 << state_bits, dtype=torch.int64, device=device)
    if code == "hyb":
        mixed = states * states + states  # below 2^33; its upper bits are not read
        first, second = pairs(device)[mixed >> 15 - INDEX_BITS & (1 << INDEX_BITS) - 1].unbind(1)
        return torch.stack([first, torch.where(mixed >> 15 & 1 == 1, -second, second)])
    if code == "1mad":
        mixed = (34038481 * states + 76625530) & 0xFFFFFFFF
        total = sum((mixed >> shift) & 0xFF for shift in (0, 8, 16, 24))
        return ((total - 510) / 147.8).float()[None]  # type: ignore[union-attr]
    mixed = ((89226354 * states + 64248484) & 0x8FFF8FFF) ^ 0x3B603B60
    halves = [((mixed >> shift) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.float16) for shift in (0, 16)]
    return (halves[0].float() + halves[1].float())[None]


@dataclass(frozen=True)
class Trellis:
    """A trellis with 2^state_bits states, in which a weight takes `bits`."""

    code: Code
    bits: int
    state_bits: int

    @property
    def width(self) -> int:
        """V, the weights of a step."""
        return 2 if self.code == "hyb" else 1

    @property
    def step_bits(self) -> int:
        """b, the bits of a step."""
        return self.bits * self.width

    def values(self, device: torch.device) -> Tensor:
        """The values of each state, (V, 2^L) float32."""
        return values(self.code, self.state_bits, device)

    def pack(self, states: Tensor) -> Tensor:
        """The circles of bits of closed paths (S, 256 / V) int32: (S, 32 bits) uint8."""
        return pack((states & (1 << self.step_bits) - 1).to(torch.uint8), self.step_bits).view(len(states), -1)

    def states(self, packed: Tensor) -> Tensor:
        """The paths (S, 256 / V) int32 of circles of bits (S, 32 bits) uint8."""
        bits = self.step_bits
        new = unpack(packed.reshape(-1), bits, (len(packed), LENGTH // self.width)).int()
        states = torch.zeros_like(new)
        for step in range(-(-self.state_bits // bits)):
            states |= new.roll(step, 1) << bits * step
        return states & (1 << self.state_bits) - 1

    def decode(self, packed: Tensor) -> Tensor:
        """The sequences (S, 256) float32 of circles of bits (S, 32 bits) uint8."""
        native = operator("trellis_decode")
        if native is not None and packed.device.type == "cpu":
            decoded: Tensor = native(packed.contiguous(), self.values(packed.device), self.step_bits)
            return decoded
        return self.along(self.states(packed))

    def along(self, paths: Tensor) -> Tensor:
        """The values (S, V T) float32 of paths (S, T)."""
        return self.values(paths.device).T[paths.flatten()].view(len(paths), -1)

    def nearest(self, targets: Tensor) -> Tensor:
        """The closed paths (S, 256 / V) int32 whose values are near `targets` (S, 256) float32."""
        seam = torch.cat([targets[:, -REACH:], targets[:, :REACH]], 1)
        return self.path(targets, self.path(seam)[:, REACH // self.width] >> self.step_bits)

    def path(self, targets: Tensor, overlap: Tensor | None = None) -> Tensor:
        """The paths (S, T) int32 whose values are nearest to `targets` (S, V T) float32.

        `overlap` (S,) int32 are L - b bits: the upper ones of the first state and the lower ones of the last. None: the
        ends are free.
        """
        native, table = operator("trellis_path"), self.values(targets.device)
        overlap = torch.full((len(targets),), -1, dtype=torch.int32) if overlap is None else overlap
        steps = targets.float().view(len(targets), -1, self.width)
        if native is not None and targets.device.type == "cpu":
            paths: Tensor = native(steps.contiguous(), table, self.step_bits, overlap)
            return paths
        parts = zip(steps.split(self._rows), overlap.to(targets.device).split(self._rows), strict=True)
        return torch.cat([self._path(part, table, ends) for part, ends in parts])

    @property
    def _rows(self) -> int:
        return max(1, _COSTS >> self.state_bits)

    def _path(self, targets: Tensor, table: Tensor, overlap: Tensor) -> Tensor:
        """Viterbi's algorithm for targets (S, T, V), for all sequences at once."""
        bits, count = self.step_bits, table.shape[1]
        states, shared = torch.arange(count, device=targets.device), count >> bits
        free = overlap[:, None] < 0
        starts = free | (states >> bits == overlap[:, None])
        costs = torch.where(starts, _nearness(targets[:, 0], table, torch.zeros_like(targets[:, 0, :1])), _NEVER)
        choices = []
        for step in range(1, targets.shape[1]):
            best, choice = costs.view(len(targets), -1, shared).min(1)
            choices.append(choice)
            costs = _nearness(targets[:, step], table, best.repeat_interleave(1 << bits, 1))
        ends = free | (states & shared - 1 == overlap[:, None])
        last = torch.where(ends, costs, torch.inf).argmin(1, keepdim=True)
        path = [last]
        for choice in reversed(choices):
            lower = path[-1] >> bits
            path.append(choice.gather(1, lower) * shared + lower)
        return torch.cat(path[::-1], 1).int()


def _nearness(targets: Tensor, table: Tensor, costs: Tensor) -> Tensor:
    """`costs` plus the squared distances of targets (S, V) to the values of all states (V, 2^L)."""
    for target, row in zip(targets.unbind(1), table, strict=True):
        costs = costs + (target[:, None] - row).square()
    return costs
