"""Puts the quantized linears of a run into its model, and their rows into its result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from harness.config import RunConfig
from harness.core import QTensor, Scheme, Stats
from harness.models import weight_of
from harness.nn import QuantLinear
from harness.quantization.install import Quantize, convert, install
from harness.quantization.result import Result, Row

Quantized = tuple[QuantLinear, Row]

_KEPT = ("name", "shape", "bits")  # of a row; its errors are those of the weight before training


@dataclass
class Installer:
    """Installs linears decoded; once their block was replayed, it converts them to the configured execution.

    schemes  schemes of linears that differ from the configuration's
    held     linears that are not converted yet, because the whole model will be trained
    exact    the float weights of those, if they will be trained too
    """

    model: nn.Module
    cfg: RunConfig
    schemes: Mapping[str, Scheme]
    result: Result
    held: list[Quantized] = field(default_factory=list)
    exact: dict[nn.Module, Tensor] = field(default_factory=dict)

    def scheme(self, name: str) -> Scheme:
        """The scheme of a linear."""
        scheme = self.schemes.get(name, self.cfg.scheme)
        assert scheme is not None
        return scheme

    def install(self, name: str, quantize: Quantize, stats: Stats) -> Quantized:
        """Quantize a linear by `quantize`, a method's hook, and put it into the model."""
        scheme = self.scheme(name)
        if self.cfg.analyses:
            self.result.floats[name] = self.model.get_submodule(name)
        weight = weight_of(self.model.get_submodule(name)).detach()
        linear, row = install(self.model, name, quantize, scheme, stats, self.result.warnings)
        if self.cfg.distillation and self.cfg.distillation.weights:
            self.exact[linear] = weight
        return linear, row | ({"bits": scheme.format.bits} if name in self.schemes else {})

    def finish(self, quantized: Iterable[Quantized]) -> None:
        """Convert linears after their block was replayed, unless the whole model will be trained."""
        if self.cfg.distillation is None:
            self._convert(quantized)
        else:
            self.held += quantized

    def release(self) -> None:
        """Convert the linears that were held back, after the whole model was trained."""
        for linear, row in self.held:
            assert isinstance(linear.packed, QTensor)
            size = {"stored_bits": linear.packed.stored_bits, "bits_per_weight": linear.packed.bits_per_weight}
            self._convert([(linear, {key: row[key] for key in _KEPT if key in row} | size)])

    def _convert(self, quantized: Iterable[Quantized]) -> None:
        for linear, row in quantized:
            if self.cfg.save is not None and isinstance(linear.packed, QTensor):
                self.result.weights[row["name"]] = linear.packed
            if kernel := convert(linear, self.cfg.execution):
                self.result.kernels.add(kernel)
            self.result.layers.append(row)
