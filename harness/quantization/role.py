"""What a step of a method does in a run: it follows from the hooks that it overrides and from the configuration."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from harness.config import RunConfig
from harness.core import Hessian, Method, MinMax, QTensor, Sample, Scheme, Stat, Stats, overrides


@dataclass(frozen=True)
class Role:
    """The step `label` of a run."""

    cfg: RunConfig
    label: str

    @property
    def step(self) -> Method:
        return self.cfg.steps[self.label]

    @property
    def quantizes(self) -> bool:
        return self.label == self.cfg.quantizing

    @property
    def transforms(self) -> bool:
        return overrides(self.step, "transform")

    @functools.cached_property
    def adjusting(self) -> list[Method]:
        """The steps, up to this one, that change weights before this one chooses their codes."""
        last = list(self.cfg.steps).index(self.label)
        steps = list(self.cfg.steps.values())[: last + 1] if self.quantizes else []
        return [step for step in steps if overrides(step, "adjust")]

    @property
    def solves(self) -> bool:
        """Whether the codes of a block are chosen together."""
        return self.quantizes and overrides(self.step, "quantize_block")

    @property
    def by_data(self) -> bool:
        """Whether the step reads calibration data."""
        observes = bool(self.step.needs or self.adjusting) or self.solves or self.cfg.static or self.cfg.ranks
        return self.transforms or (self.quantizes and observes)

    @property
    def follows(self) -> bool:
        """Whether each block reads the outputs of quantized blocks: if calibration data decides the codes."""
        by_statistics = self.quantizes and overrides(self.step, "quantize") and bool(self.step.needs)
        return (by_statistics or self.solves or bool(self.adjusting)) and self.cfg.engine.propagate == "quantized"

    @property
    def sequential(self) -> bool:
        """Whether each group is observed after the groups before it were quantized."""
        return self.follows and self.step.sequential and not self.solves

    @property
    def compares(self) -> bool:
        """Whether statistics compare the inputs with those of the float model, which differ."""
        return self.follows and any(cls.compares for cls in self.step.needs)

    @property
    def learns(self) -> bool:
        """Whether the float model's states are needed at every block."""
        return self.quantizes and (self.step.finetune is not None or self.compares or self.solves)

    @property
    def weights(self) -> bool:
        """Whether statistics weight the tokens by gradients."""
        return self.quantizes and self.cfg.engine.gradients and any(cls.weighted for cls in self.needs)

    def adjust(self, weight: Tensor, scheme: Scheme, stats: Stats) -> Tensor:
        """The weight that the step quantizes in the place of `weight`."""
        for step in self.adjusting:
            weight = step.adjust(weight, scheme, stats)
        return weight

    def quantize(self, weight: Tensor, scheme: Scheme, stats: Stats) -> QTensor:
        """The codes of a weight, after it was adjusted."""
        return self.step.quantize(self.adjust(weight, scheme, stats), scheme, stats)

    @property
    def needs(self) -> list[type[Stat]]:
        """The statistics of the step, and those that the run itself reads, in a fixed order."""
        needs = set(self.step.needs).union(*(step.needs for step in self.adjusting))
        if self.quantizes:
            needs |= {Sample} | ({MinMax} if self.cfg.static else set()) | ({Hessian} if self.cfg.ranks else set())
        return sorted(needs, key=lambda cls: cls.__qualname__)
