"""The sensitivity of each linear or block: the divergence if only it is quantized, and if all others are quantized.

Everything is measured on calibration sequences, so choices made from it are independent of the evaluation text. The
float model is the model after rewrites, which have kept its function: only the weights of linears are exchanged, and
the modules that absorbed their scales are the same on both sides. A model with one linear exchanged differs from its
base only from that linear's block on, so the base's states before each block are stored and only the later blocks run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calibration import PROBE_TOKENS, Stream, Tail, after_blocks, verify
from harness.evaluation.divergence import token_kl
from harness.models import Decoder
from harness.nn import swapped
from harness.utils.progress import Track, silent

Modules = Mapping[str, nn.Module]
Units = list[dict[str, list[str]]]  # for each block: the name of each unit -> the linears of that unit

_LOGIT_ELEMENTS = 2**24  # logits that may be computed at once: 64 MiB of float32
_STORED_ELEMENTS = 2**27  # logits of the float model that are stored, 512 MiB of float32; more are recomputed each time


@dataclass(frozen=True)
class Figures:
    """Mean KL from the float model's predictions, and mean negative log likelihood, both in nats per token."""

    kl: float
    nll: float


@dataclass(frozen=True)
class Sensitivity:
    """Figures of models in which some units are quantized; a unit is a linear or a block.

    alone, without  by name of the unit: only that unit is quantized, and all units but that one
    params          by name of the unit: number of its weights
    none, all       the float model, and the quantized model
    """

    alone: dict[str, Figures]
    without: dict[str, Figures]
    params: dict[str, int]
    none: Figures
    all: Figures

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each unit, as the record stores it."""
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
    """Sensitivities of a quantized model on `tokens` (B, T) int64; `floats` are its linears before quantization.

    The predictions of the last T - 1 tokens of each sequence are scored.
    Raises: ValueError if the model cannot be run block by block, or logits are not finite.
    """
    model = decoder.model
    quantized = {name: model.get_submodule(name) for name in floats}
    units = _units(decoder, floats, by)
    with swapped(model, floats):
        verify(decoder, tokens[:1, :PROBE_TOKENS])
        stream = Stream(decoder, tokens)
        judge = _Judge(after_blocks(decoder, tokens), tokens, [stream.onward(states)[0] for states in stream.states])
        alone, none = _exchange_each(model, stream, judge, units, quantized, track)
    without, everything = _exchange_each(model, Stream(decoder, tokens), judge, units, floats, track)
    params = {
        name: sum(_size(floats[member]) for member in members) for unit in units for name, members in unit.items()
    }
    return Sensitivity(alone, without, params, none, everything)


def _units(decoder: Decoder, floats: Modules, by: Literal["linear", "block"]) -> Units:
    """The units of each block: one for each quantized linear, or one for the whole block."""
    units: Units = []
    for index in range(len(decoder.blocks)):
        block = decoder.name(index)
        members = [name for name in floats if name.startswith(f"{block}.")]
        units.append({name: [name] for name in members} if by == "linear" else {block: members} if members else {})
    return units


def _size(module: nn.Module) -> int:
    assert isinstance(module.weight, Tensor)
    return module.weight.numel()


def _exchange_each(
    model: nn.Module, stream: Stream, judge: _Judge, units: Units, others: Modules, track: Track
) -> tuple[dict[str, Figures], Figures]:
    """Figures of `model` with the linears of one unit at a time replaced by `others`, and of the unchanged model."""
    exchanged: dict[str, Figures] = {}
    names = [(index, name) for index, unit in enumerate(units) for name in unit]
    for index, name in track(names, "sensitivity", len(names)):
        while stream.position < index:
            stream.advance()
        states = stream.states  # of the unchanged model: taken before the exchange
        with swapped(model, {member: others[member] for member in units[index][name]}):
            exchanged[name] = judge(map(stream.onward, states), name)
    return exchanged, judge(map(stream.onward, stream.states), "the whole model")


class _Judge:
    """Compares the last block's output, (1, T, D) for each sequence, with that of the float model."""

    def __init__(self, tail: Tail, tokens: Tensor, finals: Sequence[Tensor]) -> None:
        """`finals` are the float model's outputs (T, D) of its last block, one for each sequence."""
        self.tail, self.tokens, self.finals = tail, tokens.to(finals[0].device), finals
        self.width = tail(finals[0][:1]).shape[-1]
        fits = self.width * tokens.numel() <= _STORED_ELEMENTS
        self.stored = [[self._logits(part) for part in self._slices(states)] for states in finals] if fits else None

    def __call__(self, finals: Iterable[Tensor], exchanged: str) -> Figures:
        """Figures of the outputs of the last block, one for each sequence.

        Raises: ValueError, with the name of the `exchanged` unit, if a logit is not finite.
        """
        kl, nll = (torch.zeros((), dtype=torch.float64, device=self.tokens.device) for _ in range(2))
        for i, states in enumerate(finals):
            slices = zip(self._slices(states[0]), self._split(self.tokens[i, 1:]), strict=True)
            for j, (hidden, targets) in enumerate(slices):
                logits = self._logits(hidden)
                kl += token_kl(self._float_logits(i, j), logits).sum(dtype=torch.float64)
                nll += F.cross_entropy(logits, targets, reduction="sum").double()
        count = self.tokens.shape[0] * (self.tokens.shape[1] - 1)
        figures = Figures(float(kl) / count, float(nll) / count)
        if not (math.isfinite(figures.kl) and math.isfinite(figures.nll)):
            raise ValueError(
                f"analysis.sensitivity: logits are not finite with {exchanged} exchanged between float and quantized; "
                "use more bits, or add it to skip"
            )
        return figures

    def _float_logits(self, i: int, j: int) -> Tensor:
        """The float model's logits of slice `j` of sequence `i`."""
        if self.stored is not None:
            return self.stored[i][j]
        return self._logits(self._slices(self.finals[i])[j])

    def _logits(self, states: Tensor) -> Tensor:
        logits = self.tail(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _slices(self, states: Tensor) -> tuple[Tensor, ...]:
        """The states of the scored positions, all but the last, in slices."""
        return self._split(states[:-1])

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Slices of as many positions as may have logits in memory at once."""
        slices: tuple[Tensor, ...] = rows.split(max(1, _LOGIT_ELEMENTS // self.width))
        return slices
