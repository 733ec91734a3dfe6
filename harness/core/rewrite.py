"""Input groups and their producers: how a per-channel scale moves from a linear's input into what makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from harness.core.scheme import Scheme

Kind = Literal["norm", "offset_norm", "linear"]


@dataclass(frozen=True)
class Producer:
    """What makes an input group's input and can absorb a positive scale for each of its channels.

    kind    norm: weight w of an output w * x^; offset_norm: (1 + w) * x^; linear: rows of a weight (N, K)
    weight  (K,) of a norm, (N out, K in) of a linear; a view, changed in place
    rows    (K,) int64: which channel of the producer each input channel of the group follows. Under grouped
            queries several do follow one (a value head that query heads share); they have to share a scale.
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
        """Whether every input channel may have a scale of its own."""
        return int(self.rows.unique().numel()) == self.rows.numel()

    def tie(self, scale: Tensor) -> Tensor:
        """`scale` (K,) with channels of one producer channel at the largest of theirs."""
        tied = torch.zeros(len(self.weight), dtype=scale.dtype, device=scale.device)
        return tied.scatter_reduce(0, self.rows, scale, "amax", include_self=False)[self.rows]

    def divide(self, scale: Tensor) -> None:
        """Divide the producer's channels by `scale` (K,), which is tied. Channels that nobody reads stay."""
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
    """Linears of one decoder block that read the very same input tensor, in execution order.

    linears   full module names to modules, those that will be quantized
    weights   their weights as (N out, K in), by the same names; views
    others    weights of linears that read the same input and stay float (`skip`)
    scheme    the format that they will be quantized to
    schemes   formats of the linears that have one of their own, by name
    producer  what absorbs a scale, None where nothing was proved to
    scale     (K,) product of what `rescale` was given
    """

    linears: dict[str, nn.Module]
    weights: dict[str, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)
    scheme: Scheme | None = None
    schemes: dict[str, Scheme] = field(default_factory=dict)
    producer: Producer | None = None
    scale: Tensor | None = None
    trial: Callable[[Tensor], float] | None = None

    @property
    def name(self) -> str:
        return " + ".join([*self.linears, *self.others])

    @property
    def in_features(self) -> int:
        return next(iter({**self.weights, **self.others}.values())).shape[1]

    def scheme_of(self, name: str) -> Scheme:
        """The format that a linear of the group will be quantized to."""
        scheme = self.schemes.get(name, self.scheme)
        assert scheme is not None
        return scheme

    def tie(self, scale: Tensor) -> Tensor:
        """`scale` (K,), as `rescale` would apply it: equal where the producer's channel is."""
        return scale if self.producer is None else self.producer.tie(scale)

    def rescale(self, scale: Tensor) -> None:
        """Divide the input by `scale` (K,) in its producer and multiply the weights' columns by it.

        The function of the model stays. Channels that share a producer channel take the largest of their scales.
        Raises: ValueError if there is no producer, or a scale is not positive and finite.
        """
        if self.producer is None:
            raise ValueError(f"the input of {self.name} has no producer that could absorb a scale; leave it as it is")
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"a scale for {self.name} is not positive and finite; expected all of them to be")
        tied = self.tie(scale)
        self.producer.divide(tied)
        for weight in (*self.weights.values(), *self.others.values()):
            weight.copy_(weight.to(tied.dtype) * tied)
        self.scale = tied if self.scale is None else self.scale * tied

    def error(self, scale: Tensor) -> float:
        """Mean squared output error if the group were rescaled by `scale` (K,) and rounded to nearest.

        The output is that of the smallest module that holds all linears of the group, on calibration data, with
        inputs quantized where the scheme says so: the objective of AWQ's search (Lin et al. 2023, equation 4, and
        mit-han-lab/llm-awq auto_scale.py for the module).
        Raises: ValueError if the method did not say that it `searches`.
        """
        if self.trial is None:
            raise ValueError("group.error needs the block's activations; have the method's `searches` return True")
        return self.trial(self.tie(scale))
