"""What each linear, or block, costs: the divergence with it alone quantized, and with all quantized but it.

Everything is measured on calibration sequences, so that a choice made by it has not seen the evaluation text. The float
model is the one that rewrites left, with the same function as before: a linear's weights are exchanged within it, and
what absorbed its scales is the same on both sides. A model with one linear exchanged differs from its base from that
block on alone, so the base's states before each block are kept, and only the rest runs again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import PROBE_TOKENS, Stream, verify
from harness.evaluation.divergence import token_kl
from harness.evaluation.tail import Tail, after_blocks
from harness.models import Decoder
from harness.nn import swapped
from harness.utils.progress import Track, silent

Modules = Mapping[str, nn.Module]
Units = list[dict[str, list[str]]]  # for each block its units, and the linears of each

_LOGIT_ELEMENTS = 2**24  # logits that may be computed at once: 64 MiB of float32
_KEPT_ELEMENTS = 2**27  # logits of the float model that are kept, 512 MiB of float32; more are computed anew


@dataclass(frozen=True)
class Figures:
    """Mean KL to the float model's predictions, and mean negative log likelihood, in nats a token."""

    kl: float
    nll: float


@dataclass(frozen=True)
class Sensitivity:
    """`alone` with one unit quantized, `without` with all but it; `none` and `all` are the whole models."""

    alone: dict[str, Figures]
    without: dict[str, Figures]
    params: dict[str, int]
    none: Figures
    all: Figures

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a unit, as the record keeps it."""
        return [
            {
                "name": name,
                "params": self.params[name],
                "kl_alone": alone.kl,
                "nll_alone": alone.nll,
                "kl_without": self.without[name].kl,
                "nll_without": self.without[name].nll,
            }
            for name, alone in self.alone.items()
        ]


@torch.no_grad()
def measure(
    decoder: Decoder, floats: Modules, tokens: Tensor, by: Literal["linear", "block"], track: Track = silent
) -> Sensitivity:
    """Sensitivities of a quantized model, whose linears `floats` were before, on `tokens` (B, T) int64.

    Scored are the predictions of each sequence's T - 1 last tokens.
    Raises: ValueError if the model cannot be run block by block, or logits are not finite.
    """
    model = decoder.model
    quantized = {name: model.get_submodule(name) for name in floats}
    units = _units(decoder, floats, by)
    with swapped(model, floats):
        verify(decoder, tokens[:1, :PROBE_TOKENS])
        stream = Stream(decoder, tokens)
        judge = _Judge(after_blocks(decoder, tokens), tokens, [stream.onward(states)[0] for states in stream.states])
        alone, whole = _each(model, stream, judge, units, quantized, track)
    without, rounded = _each(model, Stream(decoder, tokens), judge, units, floats, track)
    params = {
        name: sum(_size(floats[member]) for member in members) for unit in units for name, members in unit.items()
    }
    return Sensitivity(alone, without, params, whole, rounded)


def _units(decoder: Decoder, floats: Modules, by: Literal["linear", "block"]) -> Units:
    units: Units = []
    for index in range(len(decoder.blocks)):
        block = decoder.name(index)
        members = [name for name in floats if name.startswith(f"{block}.")]
        units.append({name: [name] for name in members} if by == "linear" else {block: members} if members else {})
    return units


def _size(module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return module.weight.numel()


def _each(
    model: nn.Module, stream: Stream, judge: _Judge, units: Units, others: Modules, track: Track
) -> tuple[dict[str, Figures], Figures]:
    """Figures of `model` with each unit's linears exchanged for `others`, and of the model as it is."""
    found: dict[str, Figures] = {}
    names = [(index, name) for index, unit in enumerate(units) for name in unit]
    for index, name in track(names, "sensitivity", len(names)):
        while stream.position < index:
            stream.advance()
        states = stream.states  # of the model as it is: before the exchange, which they must not see
        with swapped(model, {member: others[member] for member in units[index][name]}):
            found[name] = judge(map(stream.onward, states), name)
    return found, judge(map(stream.onward, stream.states), "the whole model")


class _Judge:
    """Compares what last blocks give, (1, T, D) for each sequence, with what the float model's gave."""

    def __init__(self, tail: Tail, tokens: Tensor, finals: Sequence[Tensor]) -> None:
        """`finals` are the float model's states (T, D)."""
        self.tail, self.tokens, self.finals = tail, tokens.to(finals[0].device), finals
        self.width = tail(finals[0][:1]).shape[-1]
        keeps = self.width * tokens.numel() <= _KEPT_ELEMENTS
        self.kept = [[self._logits(part) for part in self._parts(states)] for states in finals] if keeps else None

    def __call__(self, finals: Iterable[Tensor], what: str) -> Figures:
        """Raises: ValueError, naming `what`, if a logit is not finite."""
        kl, nll = (torch.zeros((), dtype=torch.float64, device=self.tokens.device) for _ in range(2))
        for i, states in enumerate(finals):
            targets = self._cut(self.tokens[i, 1:])
            for j, (part, wanted) in enumerate(zip(self._parts(states[0]), targets, strict=True)):
                found = self._logits(part)
                kl += token_kl(self._expected(i, j), found).sum(dtype=torch.float64)
                nll += F.cross_entropy(found, wanted, reduction="sum").double()
        count = self.tokens.shape[0] * (self.tokens.shape[1] - 1)
        figures = Figures(float(kl) / count, float(nll) / count)
        if not (math.isfinite(figures.kl) and math.isfinite(figures.nll)):
            raise ValueError(
                f"analysis.sensitivity: logits are not finite with {what} exchanged between float and quantized; "
                "use more bits, or skip it"
            )
        return figures

    def _expected(self, i: int, j: int) -> Tensor:
        if self.kept is not None:
            return self.kept[i][j]
        return self._logits(self._parts(self.finals[i])[j])

    def _logits(self, states: Tensor) -> Tensor:
        logits = self.tail(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _parts(self, states: Tensor) -> tuple[Tensor, ...]:
        return self._cut(states[:-1])

    def _cut(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of as many positions as may have logits at once."""
        parts: tuple[Tensor, ...] = rows.split(max(1, _LOGIT_ELEMENTS // self.width))
        return parts
