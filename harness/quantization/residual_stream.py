"""The residual stream, discovered: what norms read for linears, and who makes it.

Nothing here knows a family of models. Whatever else is done with the stream, or with the output of such a norm, stands
in the way of turning it, and is named. What a norm computes is measured.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from harness.calibration import logits
from harness.core import Residual
from harness.core.residual import Norm, Port, Table
from harness.models import Decoder, weight_of
from harness.quantization.dataflow import Flow, Normed, Sum

_EXACT = 1e-5  # relative, for a norm beside its formula; many compute in float32 whatever they are given


@torch.no_grad()
def discover(decoder: Decoder, tokens: Tensor) -> Residual:
    """The residual stream of a model as seen on `tokens` (1, T).

    Raises: ValueError that names what stands in the way of turning it.
    """
    flow = Flow(decoder.model)
    with flow.watching():
        logits(decoder.model, tokens)
    return _Builder(decoder.model, flow, set(decoder.linears())).build()


def untied(model: nn.Module) -> None:
    """Have a model's config say what is true: that its head and its embedding no longer share a weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


@dataclass
class _Builder:
    """Makes a Residual of a flow, or names what stands in the way."""

    model: nn.Module
    flow: Flow
    inside: set[str]  # names of the linears of the blocks
    stream: frozenset[str] = field(default_factory=frozenset)

    def build(self) -> Residual:
        flow = self.flow
        own = set(flow.lone.values())
        read = {norm for norms in flow.normed.values() for norm in norms} - own
        self.stream = self._stream(read)
        self._check_uses()
        names = [name for name in flow.inputs if name in read and self._flows(*flow.inputs[name])]
        norms = [self._norm(name) for name in names]
        width = len(norms[0].gain)
        tables = [
            Table(name, module, self._norm(flow.lone[name]) if name in flow.lone else None)
            for name, module in flow.tables.items()
            if name in self.stream
        ]
        ports = {
            name: Port(name, module, weight_of(module), name in self.inside) for name, module in flow.linears.items()
        }
        for norm in norms:
            norm.readers = [ports[name] for name, sources in flow.normed.items() if norm.name in sources]
        found = Residual(
            self.model,
            width,
            tables,
            [ports[name] for name in flow.linears if name in self.stream],
            norms,
            [ports[name] for name, sums in flow.bare.items() if self._flows(*sums)],
        )
        self._check(found)
        return found

    def _stream(self, read: set[str]) -> frozenset[str]:
        """Makers of all that norms read for linears, and of whatever is summed with them."""
        sums = {value for norm in read for value in self.flow.inputs[norm]}
        if not sums:
            raise _refused(self.model, "no linear reads the output of a norm of its residual stream")
        others = set(chain.from_iterable(self.flow.inputs.values())) | set().union(*self.flow.bare.values())
        found: frozenset[str] = frozenset().union(*(value.makers for value in sums))
        while more := [value for value in others if value.makers & found and not value.makers <= found]:
            found = found.union(*(value.makers for value in more))
        return found

    def _flows(self, *values: Sum) -> bool:
        return any(value.makers & self.stream for value in values)

    def _check_uses(self) -> None:
        idle = [name for name in sorted(self.inside) if name not in self.flow.ran]
        if idle:
            raise _refused(self.model, f"{idle[0]} did not run on the probe tokens, so nothing is known of it")
        for use in self.flow.uses:
            where = use.where or "the model itself"
            if isinstance(use.value, Normed) and self._flows(use.value.of):
                what = f"the norm {use.value.norm} is read by {use.what} in {where}, where linears alone may be"
                raise _refused(self.model, what)
            if isinstance(use.value, Sum) and self._flows(use.value):
                what = f"its residual stream is read by {use.what} in {where}, which does not turn with it"
                raise _refused(self.model, what)

    def _check(self, found: Residual) -> None:
        """Hold what was found to what the arithmetic of a Residual needs."""
        both = next((name for name, norms in self.flow.normed.items() if norms & set(self.flow.lone.values())), None)
        if both is not None:
            raise _refused(self.model, f"{both} reads a norm's output that is added to the residual stream too")
        widths = [norm.gain.shape[0] for norm in found.norms] + [table.weight.shape[1] for table in found.tables]
        widths += [port.weight.shape[0] for port in found.writers] + [port.weight.shape[1] for port in found.readers]
        if set(widths) != {found.width}:
            raise _refused(self.model, f"its residual stream has several widths, {sorted(set(widths))}")
        names = [port.name for port in found.readers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise _refused(self.model, f"{twice} reads the residual stream behind several norms")
        if any(norm.centred for norm in found.norms) and (found.bare or not all(norm.centred for norm in found.norms)):
            raise _refused(self.model, "some of its norms take the mean out of the residual stream and some do not")
        tables = [id(table.weight) for table in found.tables]
        held = {port.name: id(port.module.weight) for port in (*found.writers, *found.readers)}
        untied = [weight for weight in held.values() if weight not in tables]
        if len(set(untied)) < len(untied) or len(set(tables)) < len(tables):
            raise _refused(self.model, "modules at its residual stream share weights")

    def _norm(self, name: str) -> Norm:
        found = measured(name, self.flow.norms[name])
        if found is None:
            raise _refused(self.model, f"{name} is no RMSNorm and no LayerNorm, as measured")
        return found


@torch.no_grad()
def measured(name: str, module: nn.Module) -> Norm | None:
    """What a norm computes, told by random inputs and weights to a copy of it; None where it is no known norm."""
    generator = torch.Generator().manual_seed(0)
    copied = copy.deepcopy(module).cpu().double()
    for parameter in copied.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 1)
    noise = torch.randn(64, len(Norm(name, module, False, False, 0.0).gain), generator=generator, dtype=torch.float64)
    large, small = (noise * size + size for size in (1e3, 1e-3))
    for centred in (False, True):
        for offset in (False, True):
            norm = Norm(name, copied, offset, centred, 0.0)
            if _same(copied(large), norm.of(large)):
                norm.eps = _eps(norm, small)
                if _same(copied(small), norm.of(small)):
                    return Norm(name, module, offset, centred, norm.eps)
    return None


def _eps(norm: Norm, values: Tensor) -> float:
    """The eps under which a norm shrinks small `values` as it does."""
    without = 0.0 if norm.bias is None else norm.bias
    centred = values - values.mean(-1, keepdim=True) if norm.centred else values
    plain, found = centred * norm.gain, norm.module(values) - without
    root = (plain * found).sum(-1) / plain.square().sum(-1)
    return max(float((root**-2 - centred.square().mean(-1)).mean()), 0.0)


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _EXACT * wanted.norm())


def _refused(model: nn.Module, why: str) -> ValueError:
    """The error that says why the stream of a model cannot be turned."""
    return ValueError(
        f"{type(model).__name__} cannot be rotated: {why}; use a method that rotates nothing, as gptq or smoothquant"
    )
