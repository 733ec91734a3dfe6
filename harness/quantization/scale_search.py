"""Error of a trial rescaling: the output error of a group's module with scaled, quantized weights and inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration import Stream
from harness.core import Hessian, InputGroup, Stats
from harness.core.formats import InputQuantizer
from harness.nn import first_of, hooked

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Trial:
    """Mean squared output error, for a scale, of the smallest module that contains all linears of a group.

    It runs on whole sequences, as many as fit into `tokens`, evenly spread over those of the stream; their inputs are
    captured at the first call. For a group of one linear with float inputs the Hessian is enough.
    """

    def __init__(self, stream: Stream, model: nn.Module, group: InputGroup, stats: Stats, tokens: int) -> None:
        self.stream, self.group, self.tokens = stream, group, tokens
        self.module = _smallest_module(model, [*group.linears, *group.others])
        self.hessian = _hessian(group, stats)
        self._calls: list[Call] | None = None
        self._expected: list[Tensor] = []
        self._order: list[int] = []

    @torch.no_grad()
    def __call__(self, scale: Tensor, bound: float = math.inf) -> float:
        """The error at a positive `scale` (K,); or, if that is above `bound`, any number between the two.

        Raises: ValueError if the error is not finite.
        """
        error = self._by_running(scale, bound) if self.hessian is None else self._by_hessian(scale, self.hessian)
        if not math.isfinite(error):
            raise ValueError(f"{self.group.name}: the output error of a trial scale is not finite; expected a number")
        return error

    def _rounded(self, scale: Tensor) -> dict[str, Tensor]:
        """The group's weights (N, K), scaled and rounded to nearest."""
        return {
            name: self.group.scheme_of(name).format.snap_weight(weight * scale.to(weight.dtype))
            for name, weight in self.group.weights.items()
        }

    def _by_hessian(self, scale: Tensor, hessian: Tensor) -> float:
        """tr(D H D^T) / 2N with D the weight error with respect to the unscaled input X, and H = 2 X^T X / T."""
        ((name, rounded),) = self._rounded(scale).items()
        delta = (rounded / scale - self.group.weights[name]).to(hessian.dtype)
        return float(((delta @ hessian) * delta).sum()) / (2 * len(delta))

    def _by_running(self, scale: Tensor, bound: float) -> float:
        """The error over the chosen sequences, those with large errors at the previous scale first."""
        calls = self._captured()
        count = sum(expected.numel() for expected in self._expected)
        totals = [0.0] * len(calls)
        with self._replaced(self._rounded(scale), scale):
            for i in self._order:
                args, options = calls[i]
                totals[i] = float((first_of(self.module(*args, **options)) - self._expected[i]).double().square().sum())
                if not sum(totals) / count <= bound:
                    return sum(totals) / count
        self._order.sort(key=totals.__getitem__, reverse=True)
        return sum(totals) / count

    def _captured(self) -> list[Call]:
        """Arguments of the module's call on each chosen sequence; its float outputs go to `_expected`."""
        if self._calls is None:
            states = self.stream.states
            count = max(1, min(len(states), self.tokens // states[0].shape[1]))
            chosen = [states[i * len(states) // count] for i in range(count)]
            self._calls = [self.stream.call_of(self.module, each) for each in chosen]
            self._expected = [first_of(self.module(*args, **options)) for args, options in self._calls]
            self._order = list(range(count))
        return self._calls

    @contextmanager
    def _replaced(self, rounded: dict[str, Tensor], scale: Tensor) -> Iterator[None]:
        """The module with quantized weights and inputs inside; restored at the end."""
        weights = self.group.weights
        originals = {name: weights[name].clone() for name in rounded}
        hook = self._scaled(scale)
        try:
            for name, weight in rounded.items():
                weights[name].copy_(weight)
            with hooked(module.register_forward_pre_hook(hook) for module in self.group.linears.values()):
                yield
        finally:
            for name, weight in originals.items():
                weights[name].copy_(weight)

    def _scaled(self, scale: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        """A hook that divides a linear's input by `scale`, as its producer would, and rounds it to the scheme."""
        assert self.group.scheme is not None
        fmt = self.group.scheme.activation

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs = args[0] / scale.to(args[0].dtype)
            if fmt is None:
                return (inputs, *args[1:])
            bounds = None if fmt.dynamic else (inputs.amin(), inputs.amax())
            return (InputQuantizer(fmt, bounds)(inputs), *args[1:])

        return hook


def _hessian(group: InputGroup, stats: Stats) -> Tensor | None:
    if len(group.linears) > 1 or group.others or (group.scheme is not None and group.scheme.activation is not None):
        return None
    try:
        return stats[Hessian].value
    except KeyError:
        return None


def _smallest_module(model: nn.Module, names: list[str]) -> nn.Module:
    """The deepest module that contains all of `names` and can be called."""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    while isinstance(model.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return model.get_submodule(".".join(shared))
