"""Measurements on a copy of a block: which row of a linear a channel follows, and whether a producer absorbs a scale.

To follow the rows of a linear, its output is replaced by noise, so that every row has an effect (behind a ReLU, many
rows are dead on any probe), and its rows are scaled by random factors. If a channel of the group's input then changes
by the factor of one row, at every token, this row is the channel's producer. So a scale passes through the mixing of
tokens in attention (value to output projection, with grouped queries too), through a product (up to down projection)
and through ReLU, but not through SiLU, and not from a row that enters attention scores.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration import Stream
from harness.core import Producer
from harness.core.groups import Kind
from harness.models import weight_of
from harness.nn import hooked

_SAME = 1e-4  # relative tolerance for a channel that changed by a factor
_MOST_LEFT = 1e-3  # largest share of a scale's effect on the output that may remain when its producer absorbs it
_LEAST_EFFECT = {torch.float64: 1e-7, torch.float32: 1e-3}  # smallest effect, relative to the output, for a proof
_FACTORS = (1.25, 2.0)  # range of random factors: far from 1, to distinguish changed channels from unchanged ones
_NORMS: tuple[Kind, ...] = ("norm", "offset_norm")
_SMALLEST_CHUNK = 8  # fewest rows of a fused linear that are scaled together


@dataclass(frozen=True)
class Found:
    """A producer in the structure of a block.

    name  of its module, inside the block
    rows  (K,) int64: the producer channel behind each input channel of the group
    """

    name: str
    kind: Kind
    rows: Tensor


class Scratch:
    """A copy of a block for measurements: scales its modules by random factors, reads its output and group inputs."""

    def __init__(self, block: nn.Module, probe: Stream, dtype: torch.dtype = torch.float64) -> None:
        self.probe = probe
        self.states = probe.states[0].to(dtype)
        self.block = copy.deepcopy(block).to(dtype)
        try:
            self.expected = self.run()
        except RuntimeError:  # a kernel without float64, such as those of fused experts
            self.states, self.block = self.states.float(), self.block.float()
            self.expected = self.run()
        self.least_effect = _LEAST_EFFECT[self.states.dtype]
        self.norms = [name for name, module in self.block.named_modules() if _is_norm(module)]
        self.generator = torch.Generator().manual_seed(0)

    def run(self) -> Tensor:
        return self.probe.run(self.states, self.block)

    def find(self, members: tuple[str, ...], earlier: list[str]) -> Found | None:
        """The first candidate that is proved: norms first, then the `earlier` linears from last to first."""
        for name in (norm for norm in self.norms if self.feeds(norm, members)):
            rows = torch.arange(len(self.module(name).weight))  # type: ignore[arg-type]
            for kind in _NORMS:
                if self.proves(Found(name, kind, rows), members):
                    return Found(name, kind, rows)
        for name in reversed(earlier):
            followed = self.followed_rows(name, members[0])
            if followed is not None and self.proves(Found(name, "linear", followed), members):
                return Found(name, "linear", followed)
        return None

    def feeds(self, norm: str, members: tuple[str, ...]) -> bool:
        """Whether the norm's output is the tensor that the group reads."""
        normed: list[Tensor] = []
        inputs: list[Tensor] = []
        handles = [
            self.module(norm).register_forward_hook(lambda _m, _a, output: normed.append(output)),
            self.module(members[0]).register_forward_pre_hook(lambda _m, args: inputs.append(args[0])),
        ]
        with hooked(handles):
            self.run()
        return any(output is tensor for output in normed for tensor in inputs)

    def followed_rows(self, name: str, reader: str) -> Tensor | None:
        """The row of linear `name` that each input channel of `reader` follows, (K,); None if any follows no row."""
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
        """Scale the rows `part` of a linear by distinct factors; write the row that each channel follows to `rows`."""
        factors = self.factors(part.stop - part.start)
        scale = torch.ones(len(weight_of(self.module(name))), dtype=factors.dtype, device=factors.device)
        scale[part] = factors
        after = self.input_of(reader, name, scale)
        if after is None:
            return
        ratio = (before * after).sum(0) / before.square().sum(0)
        if not (after - before * ratio).norm() <= _SAME * after.norm():
            return  # these rows change the input by more than a factor per channel
        nearest = _nearest(factors, ratio)
        follows = ((ratio / factors[nearest] - 1).abs() < _SAME) & ((ratio - 1).abs() > _SAME)
        rows[follows.cpu()] = part.start + nearest[follows].cpu()

    def proves(self, candidate: Found, members: tuple[str, ...]) -> bool:
        """Whether random factors change the block's output if only the group is scaled, but not with its producer."""
        if not self._fits(candidate, members):
            return False
        producer = bind(self.block, candidate, "")
        bias = [] if producer.bias is None else [producer.bias]
        changed = [producer.weight, *bias, *(weight_of(self.module(name)) for name in members)]
        originals = [tensor.clone() for tensor in changed]
        try:
            return self.proves_together([(candidate, members)])
        finally:
            for tensor, original in zip(changed, originals, strict=True):
                tensor.copy_(original)

    def proves_together(self, candidates: list[tuple[Found, tuple[str, ...]]]) -> bool:
        """Whether each candidate is proved: `proves` with one forward for each, and one for all. Changes the copy.

        One group after another is scaled, which must change the output, and then its producer. With all factors
        absorbed, no more may be left than one group alone may leave: random factors do not cancel each other.
        """
        effects = []
        for candidate, members in candidates:
            if not self._fits(candidate, members):
                return False
            producer = bind(self.block, candidate, "")
            scale = producer.tie(self.factors(len(candidate.rows)).to(producer.weight.dtype))
            for name in members:
                weight_of(self.module(name)).mul_(scale)
            effects.append(self._change())
            producer.divide(scale)
        effect, left = torch.stack(effects).min(), self._change()
        return bool(effect > self.least_effect * self.expected.norm() and left <= _MOST_LEFT * effect)

    def _fits(self, candidate: Found, members: tuple[str, ...]) -> bool:
        """Whether the modules exist, and the candidate has a row for each input channel of the group."""
        if any(name not in dict(self.block.named_modules()) for name in (candidate.name, *members)):
            return False
        return len(candidate.rows) == weight_of(self.module(members[0])).shape[1]

    def _change(self) -> Tensor:
        """Norm of the difference between the block's output and that of the original block, ()."""
        change: Tensor = (self.run() - self.expected).norm()
        return change

    def input_of(self, reader: str, name: str, scale: Tensor) -> Tensor | None:
        """The input (T, K) of linear `reader` if linear `name` outputs fixed noise times `scale` (N,).

        Returns: None if the reader did not run, or ran more than once.
        """
        inputs: list[Tensor] = []

        def scaled_noise(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
            return noise.to(output.device) * scale.to(output)

        handles = [
            self.module(name).register_forward_hook(scaled_noise),
            self.module(reader).register_forward_pre_hook(lambda _m, args: inputs.append(args[0])),
        ]
        with hooked(handles):
            self.run()
        return inputs[0].reshape(-1, inputs[0].shape[-1]) if len(inputs) == 1 else None

    def factors(self, count: int) -> Tensor:
        """Distinct factors (count,) with evenly spaced logarithms, in random order."""
        low, high = _FACTORS
        exponents = torch.randperm(count, generator=self.generator).double() / count
        return (low * (high / low) ** exponents).to(self.states.device)

    def module(self, name: str) -> nn.Module:
        return self.block.get_submodule(name)


def bind(block: nn.Module, candidate: Found, prefix: str) -> Producer:
    """The candidate as a producer with the weights of `block`."""
    module = block.get_submodule(candidate.name)
    bias = getattr(module, "bias", None)
    weight = weight_of(module) if candidate.kind == "linear" else module.weight
    assert isinstance(weight, Tensor)
    rows = candidate.rows.to(weight.device)
    return Producer(prefix + candidate.name, candidate.kind, weight, bias if isinstance(bias, Tensor) else None, rows)


def _nearest(factors: Tensor, ratio: Tensor) -> Tensor:
    """Index of the factor, of `factors` (N,), that is nearest to each ratio (K,)."""
    ordered, index = factors.sort()
    above = torch.searchsorted(ordered, ratio.contiguous()).clamp(1, max(len(ordered) - 1, 1))
    above = above.clamp(max=len(ordered) - 1)
    below = (above - 1).clamp(min=0)
    closer = (ratio - ordered[below]).abs() <= (ordered[above] - ratio).abs()
    return index[torch.where(closer, below, above)]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has one gain per channel; its function is measured elsewhere."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1


def _power_of_two(number: int) -> int:
    """The largest power of two that is at most `number`, and at least 1."""
    return 1 << max(number, 1).bit_length() - 1
