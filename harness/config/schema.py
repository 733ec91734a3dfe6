"""The typed configuration of a run, and of the process that it runs in; `parts` has the classes of their fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from harness.config.parts import (
    AnalysisConfig,
    DataConfig,
    EngineConfig,
    LimitsConfig,
    MeasureConfig,
    MixedConfig,
    ModelConfig,
)
from harness.core import Distillation, KVFormat, Method, Prequantized, Scheme, chooses, overrides
from harness.core.options import ALWAYS, ANALYSED, CALIBRATED, CHANGED, MIXED, NEVER, QUANTIZED
from harness.utils.errors import Conflict


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """The settings of a run that its result does not depend on: its process, and the metrics that a sweeper optimizes.

    isolate     whether each run gets a separate process; None: in sweeps, and for runs with limits
    limits      memory and time of one run
    objectives  names of the metrics that a sweeper optimizes; None: none
    """

    isolate: bool | None = field(default=None, metadata=NEVER)
    limits: LimitsConfig = field(default_factory=LimitsConfig, metadata=NEVER)
    objectives: tuple[str, ...] | None = field(default=None, metadata=NEVER)

    def __post_init__(self) -> None:
        if self.isolate is False and self.limits != LimitsConfig():
            raise ValueError(
                "isolate=False cannot enforce limits.memory_gib or limits.time_s; expected isolate=true or null"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, resolved and checked.

    model, data, measure  the model, its texts, and what is measured
    scheme       numeric format of weights and activations; None for the float baseline
    steps        the steps of the method by name, in order; empty for the float baseline
    kv           format of the KV cache; None: float
    engine       how calibration runs
    analysis     where the error of the quantized model comes from
    mixed        a separate width for each linear
    head         bits of the output head; None: float
    skip         name patterns of linears that stay float
    execution    packed: matmuls read packed weights; simulated: they read dequantized weights, and nothing is timed
    seed         seed of all random draws, 0 to 2^63 - 1
    device       auto, cpu, cuda or cuda:N
    results_dir  folder of the records
    save         folder in which the quantized model is saved; None: it is not saved
    export       format in which it is saved: this project's, or one that other programs load
    force        whether a finished run is repeated
    stale        what happens to a finished run whose code has changed since: it is run again, or kept
    warnings     what the record warns about before the run starts

    The float baseline ignores `bits`, `scheme`, `skip`, `execution`, `analysis`, `mixed` and `save`; with a `head`, it
    follows `execution`.
    """

    model: ModelConfig = field(metadata=ALWAYS)
    data: DataConfig = field(metadata=ALWAYS)
    measure: MeasureConfig = field(metadata=ALWAYS)
    scheme: Scheme | None = field(metadata=QUANTIZED)
    steps: dict[str, Method] = field(metadata=ALWAYS)
    kv: KVFormat | None = field(default=None, metadata=ALWAYS)
    engine: EngineConfig = field(default_factory=EngineConfig, metadata=CALIBRATED)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig, metadata=ANALYSED)
    mixed: MixedConfig = field(default_factory=MixedConfig, metadata=MIXED)
    head: int | None = field(default=None, metadata=CHANGED)
    skip: tuple[str, ...] = field(default=(), metadata=QUANTIZED)
    execution: Literal["packed", "simulated"] = field(default="packed", metadata=QUANTIZED)
    seed: int = field(default=0, metadata=ALWAYS)
    device: str = field(default="auto", metadata=ALWAYS)
    results_dir: str = field(default="results/runs", metadata=NEVER)
    save: str | None = field(default=None, metadata=NEVER)
    export: Literal["native", "gptq", "awq", "compressed-tensors", "gguf"] = field(default="native", metadata=NEVER)
    force: bool = field(default=False, metadata=NEVER)
    stale: Literal["rerun", "keep"] = field(default="rerun", metadata=NEVER)
    warnings: tuple[str, ...] = field(default=(), metadata=NEVER)

    def __post_init__(self) -> None:
        if not (self.model.scored or self.measure.latency):
            raise Conflict(
                f"measure.latency=False leaves nothing to do: model={self.model.name} has random weights, whose "
                "perplexity means nothing; expected measure=default or quick, or a trained model"
            )
        hooks = ("rotate", "prepare")
        rotating = next((name for name, step in self.steps.items() if any(overrides(step, x) for x in hooks)), None)
        if self.save is not None and rotating is not None:
            raise Conflict(
                f"save={self.save} cannot keep the changes that method.{rotating} makes to modules other than linears; "
                "expected save=null, or a method that rotates nothing"
            )
        if self.kv is not None and self.measure.runtime == "compiled":
            raise Conflict(
                f"measure.runtime=compiled with kv={self.kv.name}: a compiled model needs a static cache, and a "
                "quantized one grows; expected kv=none, or measure.runtime=eager"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is out of range; expected 0 to 2^63 - 1")
        self._check_head()
        self._check_adopted()
        self._check_analysis()
        self._check_mixed()

    def _check_head(self) -> None:
        if self.head is not None and not 2 <= self.head <= 8:
            raise ValueError(f"head={self.head} is out of range; expected 2 to 8 bits, or null for a float head")
        if self.head is not None and self.save is not None and self.steps:
            raise Conflict(
                f"save={self.save} with head={self.head}: the file holds the linears of decoder blocks alone; expected "
                "save=null, or head=null"
            )

    def _check_adopted(self) -> None:
        if self.model.base is not None and not self.adopts:
            raise Conflict(
                f"model.base={self.model.base.name} has no use with method={'_'.join(self.steps) or 'none'}; expected "
                "method=checkpoint, or model.base=null"
            )
        unused = {"analysis": self.analyses, "mixed.budget": self.mixes, "skip": bool(self.skip), "save": self.save}
        key = next((key for key, used in unused.items() if used), None) if self.adopts else None
        if key is not None or (self.adopts and len(self.steps) > 1):
            raise Conflict(
                f"{key or 'method=' + '_'.join(self.steps)} with method=checkpoint: its model is quantized already; "
                f"remove {key or 'the other steps'}"
            )

    def _check_analysis(self) -> None:
        tuned = next((name for name, step in self.steps.items() if step.finetune is not None), None)
        if self.analyses and tuned is not None:
            raise Conflict(
                f"analysis with method.{tuned}, which is fine-tuned: fine-tuning also changes norms, so that no linear "
                f"is quantized alone; expected method.{tuned}.epochs=0, or sensitivity=off and outliers=[]"
            )
        if self.analyses and self.analysis.windows > self.data.num_samples:
            raise Conflict(
                f"analysis.windows={self.analysis.windows} exceeds the data.num_samples={self.data.num_samples} "
                "calibration sequences; lower it, or raise data.num_samples"
            )

    def _check_mixed(self) -> None:
        if self.mixes and self.scheme is not None and self.scheme.weight is None:
            raise Conflict(
                f"mixed.budget={self.mixed.budget:g} with scheme={self.scheme.name}: method={'_'.join(self.steps)} has "
                "codes of its own, whose width cannot be chosen; use mixed.budget=null, or a method that takes a scheme"
            )
        if self.mixes and self.save is not None and self.export not in ("native", "compressed-tensors", "gguf"):
            raise Conflict(
                f"export={self.export} with mixed.budget={self.mixed.budget:g}: the file has one width for all "
                "linears; expected export=native, compressed-tensors or gguf, or mixed.budget=null"
            )

    @property
    def quantizes(self) -> bool:
        """Whether anything in the model is quantized: the linears of its blocks, or its head."""
        return bool(self.steps) or self.head is not None

    @property
    def adopts(self) -> bool:
        """Whether the model was quantized by another program: its checkpoint has the codes."""
        return any(isinstance(step, Prequantized) for step in self.steps.values())

    @property
    def analyses(self) -> bool:
        """Whether the quantized model is analysed, in addition to its evaluation."""
        return bool(self.steps) and self.analysis.on

    @property
    def ranks(self) -> bool:
        """Whether linears or blocks are ranked by the loss that quantizing them causes."""
        return self.analyses and self.analysis.sensitivity != "off"

    @property
    def mixes(self) -> bool:
        """Whether each linear gets a separate width."""
        return bool(self.steps) and self.mixed.budget is not None

    @property
    def static(self) -> bool:
        """Whether the activation ranges of the scheme come from calibration."""
        return self.scheme is not None and self.scheme.activation is not None and not self.scheme.activation.dynamic

    @property
    def calibrates(self) -> bool:
        """Whether a step, a static activation format, an analysis or the choice of widths reads calibration data."""
        hooks = ("transform", "quantize_block")
        steps = self.steps.values()
        reads = any(step.needs or step.rotation or any(overrides(step, hook) for hook in hooks) for step in steps)
        return self.static or self.analyses or self.mixes or reads or self.distillation is not None

    @property
    def distillation(self) -> Distillation | None:
        """How the quantized model is trained as a whole; None: it is not."""
        return next((step.distillation for step in self.steps.values() if step.distillation is not None), None)

    @property
    def quantizing(self) -> str | None:
        """Name of the step that chooses the codes: the last that `chooses`, else the last, which rounds."""
        choosers = [name for name, step in self.steps.items() if chooses(step)]
        names = choosers or list(self.steps)
        return names[-1] if names else None
