"""The residual stream of a model: its writers, its readers, and rotations that keep the model's function.

With stream x (T, D), orthogonal Q and readers after a norm of gain g (and bias b):

    fold    W <- W diag(g), bias <- bias + W b: the norms lose their gain. LayerNorm is RMSNorm of x - mean(x), and the
            mean is removed from the values that are written: E <- E C, W <- C W with C = I - 11^T / D
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
    """A linear that reads or writes the stream.

    weight    view (N, K) of the linear's weight
    in_block  whether the linear is inside a decoder block; False for the head and similar modules
    """

    name: str
    module: nn.Module
    weight: Tensor
    in_block: bool = True

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None

    def shift(self, amount: Tensor) -> None:
        """Add `amount` (N,) to the bias; a linear without a bias gets one."""
        if self.bias is None:
            self.module.bias = nn.Parameter(amount.to(self.weight.dtype), requires_grad=False)
        else:
            _set(self.bias, self.bias.double() + amount)


@dataclass
class Norm:
    """A norm of the stream: x^ g + b with x^ = x / sqrt(mean(x^2) + eps), for x - mean(x) if `centred`.

    offset   whether its weight is the gain minus 1
    readers  the linears that read its output; nothing else reads it
    """

    name: str
    module: nn.Module
    offset: bool
    centred: bool
    eps: float
    readers: list[Port] = field(default_factory=list)

    @property
    def gain(self) -> Tensor:
        """The gain g, (D,) float64."""
        return self._weight.double() + float(self.offset)

    @property
    def bias(self) -> Tensor | None:
        """The bias b, (D,) float64; None for a norm without bias."""
        bias = getattr(self.module, "bias", None)
        return bias.double() if isinstance(bias, Tensor) else None

    def of(self, values: Tensor) -> Tensor:
        """The norm's output for values (..., D), in float64."""
        values = values.double()
        values = values - values.mean(-1, keepdim=True) if self.centred else values
        outputs = values * (values.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.gain
        return outputs if self.bias is None else outputs + self.bias

    def clear(self) -> nn.Module:
        """The same norm without gain and bias, for a centred stream: the module itself, or RMSNorm for a LayerNorm."""
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
    """An embedding (V, D) that is added to the stream, after a norm of the embedding if the model has one (BLOOM)."""

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
    """The residual stream of one model, built by the harness. Arithmetic is in float64; weights are changed in place.

    width    D, the size of a token's state
    tables   embeddings whose sum starts the stream
    writers  linears whose output is added to the stream
    norms    norms that read the stream, each with its readers
    bare     linears that read the stream without a norm
    renamed  linears that `online` renamed: old name -> new name
    folded   whether `fold` has run
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
        """Move the gains and biases of norms into their readers and remove means from the writers; only once.

        A head that shares its weight with an embedding gets a separate copy; a warning reports its size.
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
        """Rotate the stream, after `fold`: `rotate` maps values x (..., D) float64 to x Q with Q orthogonal."""
        self.fold()
        self._write(rotate)
        for reader in self.readers:
            _set(reader.weight, rotate(reader.weight.double()))

    @torch.no_grad()
    def online(self) -> None:
        """Add a run-time Hadamard transform to the inputs of writers inside blocks; rotate their weights to match."""
        for writer in self.writers:
            if writer.in_block and writer.name not in self.renamed:
                _set(writer.weight, hadamard.rotate(writer.weight.double()))
                self.model.set_submodule(writer.name, Rotated(writer.module))
                self.renamed[writer.name] = f"{writer.name}.{Rotated.INNER}"

    def _write(self, change: Turn) -> None:
        """Apply a linear map of values (..., D) to everything that is written into the stream."""
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
                    copy = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
                    reader.module.weight, reader.weight = copy, copy
                    warnings.warn(
                        f"{reader.name} shared its weight with {table.name} and now has a separate copy, because the "
                        f"final norm's gain is folded into it: {copy.nbytes / 2**20:.1f} MiB more",
                        stacklevel=3,
                    )


def _set(target: Tensor, values: Tensor) -> None:
    target.copy_(values)  # casts to the dtype of `target`
