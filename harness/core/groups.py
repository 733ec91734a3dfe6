"""Input groups and their producers: moves a per-channel scale from the inputs of linears into their producer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from harness.core.scheme import Scheme

Kind = Literal["norm", "offset_norm", "linear"]


@dataclass(frozen=True)
class Producer:
    """The module that computes an input group's input and can absorb a positive scale per channel.

    kind    norm: weight w of an output w * x^; offset_norm: (1 + w) * x^; linear: rows of a weight (N, K)
    weight  (K,) of a norm, (N out, K in) of a linear; a view, changed in place
    rows    (K,) int64: the producer channel behind each input channel of the group. With grouped queries, several
            input channels depend on one producer channel (query heads share a value head) and must share a scale.
    """

    name: str
    kind: Kind
    weight: Tensor
    bias: Tensor | None
    rows: Tensor

    @property
    def is_norm(self) -> bool:
        return self.kind != "linear"

    @property
    def one_to_one(self) -> bool:
        """Whether every input channel may have a different scale."""
        return int(self.rows.unique().numel()) == self.rows.numel()

    def tie(self, scale: Tensor) -> Tensor:
        """`scale` (K,) after input channels of the same producer channel are set to the largest of their scales."""
        tied = torch.zeros(len(self.weight), dtype=scale.dtype, device=scale.device)
        return tied.scatter_reduce(0, self.rows, scale, "amax", include_self=False)[self.rows]

    def divide(self, scale: Tensor) -> None:
        """Divide the producer's channels by a tied `scale` (K,); channels that the group does not read stay as is."""
        factor = torch.ones(len(self.weight), dtype=scale.dtype, device=scale.device)
        factor[self.rows] = scale
        weight = self.weight.to(scale.dtype)
        if self.kind == "offset_norm":
            weight = (1 + weight) / factor - 1
        else:
            weight = weight / (factor if self.is_norm else factor[:, None])
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.copy_(self.bias.to(scale.dtype) / factor)


@dataclass
class InputGroup:
    """Linears of one decoder block that read the same input tensor, in execution order.

    linears   the linears that will be quantized, by full module name
    weights   their weights (N out, K in), by the same names; views
    others    weights of linears that read the same input and stay float (`skip`)
    scheme    the scheme of the group
    schemes   schemes of linears that differ from it, by name
    producer  the module that absorbs a scale; None if no module was proved to
    scale     (K,) product of all scales that `rescale` applied
    trial     a tied scale (K,) and a bound -> the output error that `error` returns
    """

    linears: dict[str, nn.Module]
    weights: dict[str, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)
    scheme: Scheme | None = None
    schemes: dict[str, Scheme] = field(default_factory=dict)
    producer: Producer | None = None
    scale: Tensor | None = None
    trial: Callable[[Tensor, float], float] | None = None

    @property
    def name(self) -> str:
        return " + ".join([*self.linears, *self.others])

    @property
    def in_features(self) -> int:
        return next(iter({**self.weights, **self.others}.values())).shape[1]

    def scheme_of(self, name: str) -> Scheme:
        """The scheme to which a linear of the group will be quantized."""
        scheme = self.schemes.get(name, self.scheme)
        assert scheme is not None
        return scheme

    def tie(self, scale: Tensor) -> Tensor:
        """`scale` (K,) as `rescale` would apply it: equal for input channels of the same producer channel."""
        return scale if self.producer is None else self.producer.tie(scale)

    def rescale(self, scale: Tensor) -> None:
        """Divide the input by `scale` (K,) in its producer and multiply the weights' columns by it.

        The model's function does not change. Channels that share a producer channel get the largest of their scales.
        Raises: ValueError if the group has no producer, or a scale is not positive and finite.
        """
        if self.producer is None:
            raise ValueError(f"the input of {self.name} has no producer that could absorb a scale; do not rescale it")
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"a scale for {self.name} is not positive and finite; expected finite scales above 0")
        tied = self.tie(scale)
        self.producer.divide(tied)
        for weight in (*self.weights.values(), *self.others.values()):
            weight.copy_(weight.to(tied.dtype) * tied)
        self.scale = tied if self.scale is None else self.scale * tied

    def error(self, scale: Tensor, bound: float = math.inf) -> float:
        """Mean squared output error if the group were rescaled by `scale` (K,) and rounded to nearest.

        A search passes the lowest error so far as `bound`. An error above it is returned as soon as a part of the
        calibration data exceeds the bound: then the result is above the bound, but below the error.

        The error is measured at the output of the smallest module that contains all linears of the group, on
        calibration data, with quantized inputs if the scheme has an activation format: the objective of AWQ's search
        (Lin et al. 2023, equation 4, and mit-han-lab/llm-awq auto_scale.py for the module).
        Raises: ValueError if the method's `searches` is False.
        """
        if self.trial is None:
            raise ValueError("group.error needs the block's activations; have the method's `searches` return True")
        return self.trial(self.tie(scale), bound)
