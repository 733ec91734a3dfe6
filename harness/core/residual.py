"""The residual stream of a model: who writes into it, who reads it, and how it is turned without a change of function.

With stream x (T, D), orthogonal Q and readers behind a norm of gain g (and bias b):

    fold    W <- W diag(g), bias <- bias + W b: norms keep no gain. LayerNorm is RMSNorm of x - mean(x), and the mean
            is taken out of what is written: E <- E C, W <- C W with C = I - 11^T / D
    turn    x <- x Q:  E <- E Q, writers W <- Q^T W, b <- b Q, readers W <- W Q. RMSNorm without gain commutes with Q
    online  a writer's input u <- u H at run time, its weight W <- W H

Paper: Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3 (folding, LayerNorm as RMSNorm); Ashkboos et al.
2024, QuaRot, arXiv 2404.00456, section 4 (rotations, online Hadamard).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harness.core import hadamard
from harness.core.rotated import Rotated

Turn = Callable[[Tensor], Tensor]


@dataclass
class Port:
    """A linear at the stream; `weight` is a view (N, K) of its own. `in_block` tells it from the head and the like."""

    name: str
    module: nn.Module
    weight: Tensor
    in_block: bool = True

    @property
    def bias(self) -> Tensor | None:
        found = self.module.bias
        return found if isinstance(found, Tensor) else None

    def shift(self, amount: Tensor) -> None:
        """Add `amount` (N,) to the bias, which is made where there is none."""
        if self.bias is None:
            self.module.bias = nn.Parameter(amount.to(self.weight.dtype), requires_grad=False)
        else:
            _set(self.bias, self.bias.double() + amount)


@dataclass
class Norm:
    """A norm of the stream: x^ g + b with x^ = x / sqrt(mean(x^2) + eps), of x - mean(x) where `centred`.

    offset   whether its weight is the gain less 1
    readers  the linears that read its output, and all that does
    """

    name: str
    module: nn.Module
    offset: bool
    centred: bool
    eps: float
    readers: list[Port] = field(default_factory=list)

    @property
    def gain(self) -> Tensor:
        """(D,) float64."""
        return self._weight.double() + float(self.offset)

    @property
    def bias(self) -> Tensor | None:
        """(D,) float64, None where it has none."""
        found = getattr(self.module, "bias", None)
        return found.double() if isinstance(found, Tensor) else None

    def of(self, values: Tensor) -> Tensor:
        """The norm's output for values (..., D), in float64."""
        values = values.double()
        values = values - values.mean(-1, keepdim=True) if self.centred else values
        found = values * (values.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.gain
        return found if self.bias is None else found + self.bias

    def clear(self) -> nn.Module:
        """The same norm of a centred stream without gain and bias: its own module, or RMSNorm for a LayerNorm."""
        if self.centred:
            return nn.RMSNorm(len(self._weight), eps=self.eps, elementwise_affine=False)
        self._weight.fill_(0.0 if self.offset else 1.0)
        if self.bias is not None:
            self.module.bias.zero_()  # type: ignore[operator]
        return self.module

    @property
    def _weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass
class Table:
    """An embedding (V, D) that is added to the stream, behind a norm of its own where there is one (BLOOM)."""

    name: str
    module: nn.Module
    norm: Norm | None = None

    @property
    def weight(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


@dataclass
class Residual:
    """The stream of one model, as the harness found it. Arithmetic is in float64, weights are changed in place.

    width    D, the size of a token's state
    tables   embeddings that are summed into it
    writers  linears whose output is added to it
    norms    norms that read it, each with its readers
    bare     linears that read it without a norm
    renamed  linears that `online` gave another name: old name to new
    """

    model: nn.Module
    width: int
    tables: list[Table]
    writers: list[Port]
    norms: list[Norm]
    bare: list[Port] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    folded: bool = False

    @property
    def readers(self) -> list[Port]:
        return [*self.bare, *(reader for norm in self.norms for reader in norm.readers)]

    @torch.no_grad()
    def fold(self) -> None:
        """Move the gains and biases of norms into their readers, and means out of what is written, once.

        A head that shares its weight with an embedding gets one of its own, and a warning says what that costs.
        """
        if self.folded:
            return
        self._untie()
        for table in self.tables:
            if table.norm is not None:
                _set(table.weight, table.norm.of(table.weight))
                self.model.set_submodule(table.norm.name, nn.Identity())
                table.norm = None
        for norm in self.norms:
            for reader in norm.readers:
                if norm.bias is not None:
                    reader.shift(reader.weight.double() @ norm.bias)
                _set(reader.weight, reader.weight.double() * norm.gain)
        if any(norm.centred for norm in self.norms):
            self._write(lambda values: values - values.mean(-1, keepdim=True))
        for norm in self.norms:
            self.model.set_submodule(norm.name, norm.clear())
        self.folded = True

    @torch.no_grad()
    def turn(self, rotate: Turn) -> None:
        """Turn the stream: `rotate` maps values (..., D) float64 to x Q with Q orthogonal. Folds first."""
        self.fold()
        self._write(rotate)
        for reader in self.readers:
            _set(reader.weight, rotate(reader.weight.double()))

    @torch.no_grad()
    def online(self) -> None:
        """Turn the inputs of writers inside the blocks by a Hadamard transform at run time, and their weights back."""
        for writer in self.writers:
            if writer.in_block and writer.name not in self.renamed:
                _set(writer.weight, hadamard.rotate(writer.weight.double()))
                self.model.set_submodule(writer.name, Rotated(writer.module))
                self.renamed[writer.name] = f"{writer.name}.{Rotated.INNER}"

    def _write(self, change: Turn) -> None:
        """Apply a linear map of the stream's values (..., D) to all that is written into it."""
        for table in self.tables:
            _set(table.weight, change(table.weight.double()))
        for writer in self.writers:
            _set(writer.weight, change(writer.weight.double().T).T)
            if writer.bias is not None:
                _set(writer.bias, change(writer.bias.double()))

    def _untie(self) -> None:
        for table in self.tables:
            for reader in self.readers:
                if reader.module.weight is table.weight:
                    own = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
                    reader.module.weight, reader.weight = own, own
                    warnings.warn(
                        f"{reader.name} shared its weight with {table.name} and has one of its own now, as the final "
                        f"norm's gain is folded into it: {own.nbytes / 2**20:.1f} MiB more",
                        stacklevel=3,
                    )


def _set(target: Tensor, values: Tensor) -> None:
    target.copy_(values)  # in the target's own dtype
