"""Who makes a group's input and could absorb a per-channel scale: found by measuring, proved by measuring.

Nothing here knows a family of models. A candidate is a norm whose output is the very tensor that the group
reads, or a linear that ran before it. What a linear gives is replaced by noise, so that every row is seen at work
(of a ReLU's many are dead on any probe), and its rows are scaled by random factors: where each channel of the
group's input then moves by one row's factor, at every token, that row is the channel's producer. So a scale
passes through attention's mixing of tokens (value to output projection, with grouped queries too), through a
product (up to down projection), and through ReLU; not through SiLU, and not from a row that enters scores.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration import Stream
from harness.core import InputGroup, Producer
from harness.core.groups import Kind
from harness.models import weight_of
from harness.nn import hooked

_SAME = 1e-4  # relative, for a channel that moved by a factor
_KEPT = 1e-3  # how much of what a scale moves may be left once its producer absorbs it
_SEEN = {torch.float64: 1e-7, torch.float32: 1e-3}  # and how much that has to be, beside the output, to prove a thing
_FACTORS = (1.25, 2.0)  # random factors: far from 1, so that a channel that did not move is told apart
_NORMS: tuple[Kind, ...] = ("norm", "offset_norm")
_SMALLEST_CHUNK = 8  # rows of a fused linear that are tried together


@dataclass(frozen=True)
class Found:
    """A producer as the block's structure gives it: names within the block, and who follows what."""

    name: str
    kind: Kind
    rows: Tensor


class Discovery:
    """Finds producers in one block and proves them anew in every other of the same structure."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Found | None] = {}

    @torch.no_grad()
    def producers(self, probe: Stream, groups: list[InputGroup], prefix: str) -> None:
        """Set `producer` of each group of the block at the probe's position, whose modules start with `prefix`.

        Works on a copy of the block in float64 (float32 where it has no such kernel), so that low precision neither
        hides nor feigns a producer.
        """
        block = probe.blocks[probe.position]
        scratch = _Scratch(block, probe)
        earlier: list[str] = []
        for group in groups:
            members = tuple(name.removeprefix(prefix) for name in (*group.linears, *group.others))
            known = self._known.get(members)
            if members not in self._known or (known is not None and not scratch.proves(known, members)):
                known = scratch.find(members, earlier)
            self._known[members] = known
            group.producer = _bind(block, known, prefix) if known else None
            earlier += members


class _Scratch:
    """A copy of a block to measure on: random factors in, block output and group inputs out."""

    def __init__(self, block: nn.Module, probe: Stream) -> None:
        self.probe = probe
        self.states = probe.states[0].double()
        self.block = copy.deepcopy(block).double()
        try:
            self.run()
        except RuntimeError:  # a kernel without float64, such as those of fused experts
            self.states, self.block = self.states.float(), self.block.float()
        self.seen = _SEEN[self.states.dtype]
        self.norms = [name for name, module in self.block.named_modules() if _is_norm(module)]
        self.expected = self.run()
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> Tensor:
        return self.probe.run(self.states, self.block)

    def find(self, members: tuple[str, ...], earlier: list[str]) -> Found | None:
        """The first candidate that is proved: norms, then linears, the latest first."""
        for name in (norm for norm in self.norms if self.feeds(norm, members)):
            rows = torch.arange(len(self.module(name).weight))  # type: ignore[arg-type]
            for kind in _NORMS:
                if self.proves(Found(name, kind, rows), members):
                    return Found(name, kind, rows)
        for name in reversed(earlier):
            mapped = self.followed_rows(name, members[0])
            if mapped is not None and self.proves(Found(name, "linear", mapped), members):
                return Found(name, "linear", mapped)
        return None

    def feeds(self, norm: str, members: tuple[str, ...]) -> bool:
        """Whether the norm's output is the tensor that the group reads."""
        made: list[Tensor] = []
        read: list[Tensor] = []
        handles = [
            self.module(norm).register_forward_hook(lambda _m, _a, output: made.append(output)),
            self.module(members[0]).register_forward_pre_hook(lambda _m, args: read.append(args[0])),
        ]
        with hooked(handles):
            self.run()
        return any(output is inputs for output in made for inputs in read)

    def followed_rows(self, name: str, reader: str) -> Tensor | None:
        """For each channel of `reader`'s input the row of linear `name` that it follows; None if any follows none."""
        count = len(weight_of(self.module(name)))
        before = self.input_of(reader, name, torch.ones(count))
        if before is None:
            return None
        chunk = count
        while chunk >= _SMALLEST_CHUNK:
            rows = torch.full((before.shape[-1],), -1)
            for start in range(0, count, chunk):
                self._follow(name, reader, before, slice(start, min(start + chunk, count)), rows)
            if bool((rows >= 0).all()):
                return rows
            chunk = min(chunk // 2, max(_SMALLEST_CHUNK, _power_of_two(count // 16)))
        return None

    def _follow(self, name: str, reader: str, before: Tensor, part: slice, rows: Tensor) -> None:
        """Scale some rows of a linear by factors of their own and note in `rows` which channels moved by which."""
        factors = self.factors(part.stop - part.start)
        scale = torch.ones(len(weight_of(self.module(name))), dtype=factors.dtype, device=factors.device)
        scale[part] = factors
        after = self.input_of(reader, name, scale)
        if after is None:
            return
        ratio = (before * after).sum(0) / before.square().sum(0)
        if not (after - before * ratio).norm() <= _SAME * after.norm():
            return  # these rows move more than a scale
        nearest = _nearest(factors, ratio)
        moved = ((ratio / factors[nearest] - 1).abs() < _SAME) & ((ratio - 1).abs() > _SAME)
        rows[moved.cpu()] = part.start + nearest[moved].cpu()

    def proves(self, found: Found, members: tuple[str, ...]) -> bool:
        """Whether random factors through producer and group leave the block's output, and alone move it."""
        if any(name not in dict(self.block.named_modules()) for name in (found.name, *members)):
            return False
        producer = _bind(self.block, found, "")
        if len(found.rows) != weight_of(self.module(members[0])).shape[1]:
            return False
        weights = [weight_of(self.module(name)) for name in members]
        kept = [tensor.clone() for tensor in (producer.weight, *weights)]
        bias = None if producer.bias is None else producer.bias.clone()
        scale = producer.tie(self.factors(len(found.rows)).to(producer.weight.dtype))
        try:
            for weight in weights:
                weight.mul_(scale)
            alone = self.run()
            producer.divide(scale)
            both = self.run()
        finally:
            for tensor, original in zip((producer.weight, *weights), kept, strict=True):
                tensor.copy_(original)
            if producer.bias is not None and bias is not None:
                producer.bias.copy_(bias)
        moved, left = (alone - self.expected).norm(), (both - self.expected).norm()
        return bool(moved > self.seen * self.expected.norm() and left <= _KEPT * moved)

    def input_of(self, reader: str, name: str, scale: Tensor) -> Tensor | None:
        """The input (T, K) of linear `reader` when linear `name` gives the same noise each time, times `scale` (N,).

        None if the reader did not run, or more than once.
        """
        seen: list[Tensor] = []

        def noise(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            made = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
            return made.to(output.device) * scale.to(output)

        handles = [
            self.module(name).register_forward_hook(noise),
            self.module(reader).register_forward_pre_hook(lambda _m, args: seen.append(args[0])),
        ]
        with hooked(handles):
            self.run()
        return seen[0].reshape(-1, seen[0].shape[-1]) if len(seen) == 1 else None

    def factors(self, count: int) -> Tensor:
        """Distinct factors, evenly spread in their logarithm, in random order."""
        low, high = _FACTORS
        exponents = torch.randperm(count, generator=self.generator).double() / count
        return (low * (high / low) ** exponents).to(self.states.device)

    def module(self, name: str) -> nn.Module:
        return self.block.get_submodule(name)


def _bind(block: nn.Module, found: Found, prefix: str) -> Producer:
    """The producer in this very block."""
    module = block.get_submodule(found.name)
    bias = getattr(module, "bias", None)
    weight = weight_of(module) if found.kind == "linear" else module.weight
    assert isinstance(weight, Tensor)
    rows = found.rows.to(weight.device)
    return Producer(prefix + found.name, found.kind, weight, bias if isinstance(bias, Tensor) else None, rows)


def _nearest(factors: Tensor, ratio: Tensor) -> Tensor:
    """Index of the factor (N,) next to each ratio (K,)."""
    ordered, index = factors.sort()
    above = torch.searchsorted(ordered, ratio.contiguous()).clamp(1, max(len(ordered) - 1, 1))
    above = above.clamp(max=len(ordered) - 1)
    below = (above - 1).clamp(min=0)
    closer = (ratio - ordered[below]).abs() <= (ordered[above] - ratio).abs()
    return index[torch.where(closer, below, above)]


def _is_norm(module: nn.Module) -> bool:
    """A module with a gain a channel; what it really does is measured."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _power_of_two(number: int) -> int:
    return 1 << max(number, 1).bit_length() - 1
