"""Discovers the residual stream: the sum that norms read for linears, and the modules that write it.

No family of models is named here. Any other use of the stream, or of the output of such a norm, prevents a rotation,
and the error names it. The function of each norm is measured.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from harness.core import Residual
from harness.core.residual import Norm, Port, Table
from harness.models import Decoder, logits, weight_of
from harness.quantization.dataflow import Flow, Normed, Sum

_EXACT = 1e-5  # relative error of a norm to its formula; many norms compute in float32 for any input dtype


@torch.no_grad()
def discover(decoder: Decoder, tokens: Tensor) -> Residual:
    """The residual stream of a model, from one forward on `tokens` (1, T).

    Raises: ValueError that says only why it cannot be rotated; the caller adds the method and what to do.
    """
    flow = Flow(decoder)
    with flow.watching():
        logits(decoder.model, tokens)
    return _Builder(decoder.model, flow, set(decoder.linears())).build()


def untied(model: nn.Module) -> None:
    """Update a model's config if its head and its embedding no longer share a weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


@dataclass
class _Builder:
    """Builds a Residual from an observed flow, or raises an error that names the obstacle."""

    model: nn.Module
    flow: Flow
    inside: set[str]  # names of the linears in the blocks
    stream: frozenset[str] = field(default_factory=frozenset)  # names of the modules that write the stream

    def build(self) -> Residual:
        flow = self.flow
        embedding_norms = set(flow.lone.values())
        reader_norms = {norm for norms in flow.normed.values() for norm in norms} - embedding_norms
        self.stream = self._stream(reader_norms)
        self._check_uses()
        names = [name for name in flow.inputs if name in reader_norms and self._flows(*flow.inputs[name])]
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
        residual = Residual(
            self.model,
            width,
            tables,
            [ports[name] for name in flow.linears if name in self.stream],
            norms,
            [ports[name] for name, sums in flow.bare.items() if self._flows(*sums)],
        )
        self._check(residual)
        return residual

    def _stream(self, reader_norms: set[str]) -> frozenset[str]:
        """Makers of every sum that norms read for linears, and of all sums that share a maker with them."""
        sums = {value for norm in reader_norms for value in self.flow.inputs[norm]}
        if not sums:
            raise ValueError("no linear reads the output of a norm of its residual stream")
        others = set(chain.from_iterable(self.flow.inputs.values())) | set().union(*self.flow.bare.values())
        makers: frozenset[str] = frozenset().union(*(value.makers for value in sums))
        while overlapping := [value for value in others if value.makers & makers and not value.makers <= makers]:
            makers = makers.union(*(value.makers for value in overlapping))
        return makers

    def _flows(self, *values: Sum) -> bool:
        return any(value.makers & self.stream for value in values)

    def _check_uses(self) -> None:
        idle = [name for name in sorted(self.inside) if name not in self.flow.ran]
        if idle:
            raise ValueError(f"{idle[0]} did not run on the probe tokens")
        for use in self.flow.uses:
            where = use.where or "the model itself"
            if isinstance(use.value, Normed) and self._flows(use.value.of):
                raise ValueError(f"the norm {use.value.norm} is read by {use.what} in {where}")
            if isinstance(use.value, Sum) and self._flows(use.value):
                raise ValueError(f"its residual stream is read by {use.what} in {where}")

    def _check(self, residual: Residual) -> None:
        """Check that the arithmetic of a Residual holds for its norms, readers and writers."""
        norms, readers, writers = residual.norms, residual.readers, residual.writers
        embedding_norms = set(self.flow.lone.values())
        shared = next((name for name, read in self.flow.normed.items() if read & embedding_norms), None)
        if shared is not None:
            raise ValueError(f"{shared} reads a norm's output that is also added to the residual stream")
        widths = [norm.gain.shape[0] for norm in norms] + [table.weight.shape[1] for table in residual.tables]
        widths += [port.weight.shape[0] for port in writers] + [port.weight.shape[1] for port in readers]
        if set(widths) != {residual.width}:
            raise ValueError(f"its residual stream has several widths, {sorted(set(widths))}")
        names = [port.name for port in readers]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} reads the residual stream through several norms")
        if any(norm.centred for norm in norms) and (residual.bare or not all(norm.centred for norm in norms)):
            raise ValueError("some norms of its residual stream subtract the mean and some do not")
        tables = [id(table.weight) for table in residual.tables]
        weights = {port.name: id(port.module.weight) for port in (*writers, *readers)}
        untied = [weight for weight in weights.values() if weight not in tables]
        if len(set(untied)) < len(untied) or len(set(tables)) < len(tables):
            raise ValueError("modules that read or write its residual stream share weights")
        ends = {id(port.module) for port in (*writers, *readers)} | {id(table.module) for table in residual.tables}
        for name, module in self.model.named_modules():
            if id(module) not in ends and id(getattr(module, "weight", None)) in {*tables, *weights.values()}:
                raise ValueError(f"{name} shares a weight with a module of its residual stream, but is none of them")

    def _norm(self, name: str) -> Norm:
        norm = measured(name, self.flow.norms[name])
        if norm is None:
            raise ValueError(f"{name} is neither RMSNorm nor LayerNorm, as measured")
        return norm


@torch.no_grad()
def measured(name: str, module: nn.Module) -> Norm | None:
    """The function of a norm, measured on a copy with random inputs and weights; None if it is no RMSNorm or LayerNorm.

    Known norms have the form of `Norm`: with or without mean subtraction, and with the weight as gain or as gain - 1.
    """
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
    """The eps of a norm, from its outputs for `values` (T, D) whose mean square is small compared with it."""
    bias = 0.0 if norm.bias is None else norm.bias
    centred = values - values.mean(-1, keepdim=True) if norm.centred else values
    scaled, outputs = centred * norm.gain, norm.module(values) - bias
    inverse_root = (scaled * outputs).sum(-1) / scaled.square().sum(-1)
    return max(float((inverse_root**-2 - centred.square().mean(-1)).mean()), 0.0)


def _same(outputs: Tensor, expected: Tensor) -> bool:
    return bool((outputs - expected).norm() <= _EXACT * expected.norm())
