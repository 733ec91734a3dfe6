"""One pass of a method's step over the blocks of a model: observe, transform, quantize, replay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from harness.calibration import (
    PROBE_TOKENS,
    SAME_FUNCTION,
    Importance,
    Limits,
    Observer,
    Reference,
    Stream,
    groups_of,
    relative_error,
    shortcuts,
    verify,
    within,
)
from harness.config import RunConfig
from harness.core import Hessian, InputGroup, Method, MinMax, QTensor, Sample, Scheme, Stat, Stats, overrides
from harness.models import Decoder
from harness.nn import QuantLinear
from harness.quantization.blocks import block_of
from harness.quantization.distill import distill, teacher_of
from harness.quantization.finetune import finetune
from harness.quantization.install import Quantize, convert, install, recorded, row_of
from harness.quantization.producers import Discovery
from harness.quantization.result import Result, Row
from harness.quantization.scale_search import Trial
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track

Quantized = tuple[QuantLinear, Row]


@dataclass
class _Streams:
    """The activations of one pass, all at the same block.

    observer  the calibration sequences, with the statistics of their inputs
    probe     a few tokens through the float model; rewrites are proved on them
    teacher   the calibration sequences through the float model, if the step compares with it
    """

    observer: Observer
    probe: Stream
    teacher: Stream | None


@dataclass
class Pass:
    """One pass of the step `label` over the blocks of a model.

    names      the linears to quantize
    result     collects the rows, warnings and weights
    rescaled   linear -> names of the producers that absorbed a scale of its input; the pass adds to it
    schemes    schemes of linears that differ from the configuration's
    discovery  the producers of all blocks so far
    unscaled   members of a group without producer -> indices of the blocks
    held       quantized linears that are not converted yet, because the whole model will be trained
    """

    decoder: Decoder
    cfg: RunConfig
    label: str
    names: list[str]
    result: Result
    rescaled: dict[str, str]
    schemes: dict[str, Scheme]
    discovery: Discovery = field(default_factory=Discovery)
    unscaled: dict[str, list[int]] = field(default_factory=dict)
    held: list[Quantized] = field(default_factory=list)

    @property
    def step(self) -> Method:
        return self.cfg.steps[self.label]

    @property
    def quantizes(self) -> bool:
        return self.label == self.cfg.quantizing

    @property
    def transforms(self) -> bool:
        return overrides(self.step, "transform")

    @property
    def solves(self) -> bool:
        """Whether the codes of a block are chosen together."""
        return self.quantizes and overrides(self.step, "quantize_block")

    @property
    def by_data(self) -> bool:
        """Whether the pass reads calibration data."""
        observes = bool(self.step.needs) or self.solves or self.cfg.static or self.cfg.ranks
        return self.transforms or (self.quantizes and observes)

    @property
    def follows(self) -> bool:
        """Whether each block reads the outputs of quantized blocks: if calibration data decides the codes."""
        by_statistics = self.quantizes and overrides(self.step, "quantize") and bool(self.step.needs)
        return (by_statistics or self.solves) and self.cfg.engine.propagate == "quantized"

    @property
    def sequential(self) -> bool:
        """Whether each group is observed after the groups before it were quantized."""
        return self.follows and self.step.sequential and not self.solves

    @property
    def compares(self) -> bool:
        """Whether statistics compare the inputs with those of the float model, which differ."""
        return self.follows and any(cls.compares for cls in self.step.needs)

    def run(self, tokens: Tensor, track: Track, cache: DiskCache) -> None:
        """Quantize, or rewrite, all blocks; and train the quantized model as a whole, if the method does."""
        options = self.cfg.distillation if self.quantizes else None
        teacher = teacher_of(self.decoder, tokens) if options else None
        if self.by_data:
            self.by_blocks(tokens, track, cache)
        elif self.quantizes:
            self.at_once(track)
        if options and teacher:
            self.result.distilled = distill(self.decoder, tokens, teacher, options, track)
            self.finish()

    def at_once(self, track: Track) -> None:
        """Quantize all linears one by one, without data."""
        for name in track(self.names, self.label, len(self.names)):
            linear, row = self._install(name, Stats())
            self._finish([(linear, row)])

    def by_blocks(self, tokens: Tensor, track: Track, cache: DiskCache) -> None:
        """Observe, transform, quantize and replay each block."""
        try:
            verify(self.decoder, tokens[:1, :PROBE_TOKENS])
            streams = self._streams(tokens, cache)
        except ValueError as error:
            raise ValueError(f"method.{self.label}: {error}") from error
        total = len(streams.probe.blocks)
        progress = [f"{self.label} block 1/{total}"]  # one text, which `track` reads again after each block
        for index in track(range(total), lambda: progress[0], total):
            quantized = self._block(streams)
            progress[0] = f"{self.label} block {min(index + 2, total)}/{total}{_mean_error(quantized)}"
        self.result.warnings += [
            f"method.{self.label}: no producer was proved for {members} in blocks {_ranges(blocks)}; "
            "their inputs are not rescaled"
            for members, blocks in self.unscaled.items()
        ]

    def _streams(self, tokens: Tensor, cache: DiskCache) -> _Streams:
        stream, probe = Stream(self.decoder, tokens), Stream(self.decoder, tokens[:1, :PROBE_TOKENS])
        searches = self.transforms and self.step.searches
        weighted = self.quantizes and self.cfg.engine.gradients and any(cls.weighted for cls in self.step.needs)
        importance = Importance(self.decoder, tokens, self.names) if weighted else None
        observer = Observer(stream, cache, self.names, self._needs(), not self.follows, searches, importance)
        taught = self.step.finetune or self.compares or self.solves
        teacher = stream.copy() if self.quantizes and taught else None
        return _Streams(observer, probe, teacher)

    def _block(self, streams: _Streams) -> list[Quantized]:
        """Transform, quantize and train the block at the streams' position, and advance them past it."""
        stream, probe, teacher = streams.observer.stream, streams.probe, streams.teacher
        groups = groups_of(self.decoder, self.names, probe, self.cfg.scheme, self.schemes)
        expected = probe.run(probe.states[0])
        if self.sequential and not self.transforms:  # else inputs are observed before the transforms
            stream.shortcuts = shortcuts(stream.blocks[stream.position], lambda: probe.run(probe.states[0]))
        if self.transforms:
            self._find_producers(probe, groups)
        reference = Reference(teacher) if teacher else None
        quantized = self._rewrite(streams, groups, expected, reference)
        if reference:
            if self.step.finetune:
                self._finetune(stream, reference.targets, groups, quantized)
            reference.advance()
        streams.observer.advance()
        probe.advance([expected])
        self._finish(quantized)
        return quantized

    def _find_producers(self, probe: Stream, groups: list[InputGroup]) -> None:
        """Set the producers of one block's groups, and note the groups without one."""
        prefix = f"{self.decoder.name(probe.position)}."
        self.discovery.producers(probe, groups, prefix)
        for group in groups:
            if group.producer is None:
                self.unscaled.setdefault(group.name.replace(prefix, ""), []).append(probe.position)

    def _rewrite(
        self, streams: _Streams, groups: list[InputGroup], expected: Tensor, reference: Reference | None
    ) -> list[Quantized]:
        """Observe, transform and quantize the groups of one block; `expected` is its float output on the probe."""
        observer, probe = streams.observer, streams.probe
        self._hold(reference)
        stats = observer.observe(groups, reference) if self.transforms or not self.sequential else []
        if self.transforms:
            for group, group_stats in zip(groups, stats, strict=True):
                self._transform(group, group_stats, observer.stream)
            transformed = probe.run(probe.states[0])
            same_function(self.label, expected, transformed, f"the output of block {probe.position}")
            self._hold(reference)
        if self.solves and reference:
            return self._solve(observer.stream, groups, stats, reference)
        quantized = []
        for i, group in enumerate(groups if self.quantizes else ()):
            group_stats = observer.observe([group], reference)[0] if self.sequential else stats[i]
            quantized += [self._install(name, group_stats) for name in group.linears]
        return quantized

    def _solve(
        self, stream: Stream, groups: list[InputGroup], stats: list[Stats], reference: Reference
    ) -> list[Quantized]:
        """Quantize all linears of a block together."""
        by_name = {name: each for group, each in zip(groups, stats, strict=True) for name in group.linears}
        schemes = {name: self._scheme(name) for name in by_name}
        block = block_of(self.decoder.model, stream, reference, schemes, by_name)
        with recorded(self.decoder.name(stream.position), self.result.warnings):
            solved = self.step.quantize_block(block)
        if missing := [name for name in by_name if name not in solved]:
            raise ValueError(f"method.{self.label}: quantize_block returned no weight for {missing[0]}")
        return [self._install(name, each, lambda *_, name=name: solved[name]) for name, each in by_name.items()]

    def _hold(self, reference: Reference | None) -> None:
        """Keep the block in its present state for statistics that compare with it."""
        if reference and self.compares:
            reference.hold()

    def _transform(self, group: InputGroup, stats: Stats, stream: Stream) -> None:
        if self.step.searches:
            group.trial = Trial(stream, self.decoder.model, group, stats, self.cfg.engine.search_tokens)
        with recorded(group.name, self.result.warnings):
            self.step.transform(group, stats)
        group.trial = None  # frees the activations that it holds
        if group.scale is not None and group.producer is not None:
            stats.rescale(group.scale)
            for name in group.linears:
                producers = self.rescaled.get(name)
                self.rescaled[name] = f"{producers}, {group.producer.name}" if producers else group.producer.name

    def _finetune(
        self, stream: Stream, targets: list[Tensor], groups: list[InputGroup], quantized: list[Quantized]
    ) -> None:
        """Train the block that has just been quantized, and update its rows."""
        assert self.step.finetune is not None
        block = stream.blocks[stream.position]
        stream.shortcuts = ()  # their inputs are those of the block before training
        tuned = finetune(block, stream.run_to_train, stream.states, targets, self.step.finetune)
        if tuned is None:
            return
        weights = {name: weight for group in groups for name, weight in group.weights.items()}
        for linear, row in quantized:
            assert isinstance(linear.packed, QTensor)
            row |= row_of(row["name"], weights[row["name"]], linear.packed)
            row.pop("hessian_error", None)  # that of the weight before training
            row |= {"block_error": tuned.after, "block_error_untuned": tuned.before}

    def _scheme(self, name: str) -> Scheme:
        """The scheme of a linear."""
        scheme = self.schemes.get(name, self.cfg.scheme)
        assert scheme is not None
        return scheme

    def _install(self, name: str, stats: Stats, quantize: Quantize | None = None) -> Quantized:
        """Quantize a linear by `quantize`, by default the method's, and put it into the model."""
        scheme = self._scheme(name)
        if self.cfg.analyses:
            self.result.floats[name] = self.decoder.model.get_submodule(name)
        quantize = quantize or self.step.quantize
        linear, row = install(self.decoder.model, name, quantize, scheme, stats, self.result.warnings)
        return linear, row | ({"bits": scheme.format.bits} if name in self.schemes else {})

    def finish(self) -> None:
        """Finish the linears that were held back until the whole model was trained."""
        for linear, row in self.held:
            assert isinstance(linear.packed, QTensor)
            row |= {"stored_bits": linear.packed.stored_bits, "bits_per_weight": linear.packed.bits_per_weight}
            for measured in ("weight_error", "weight_norm", "hessian_error", "output_error"):  # of the weight before
                row.pop(measured, None)
            self._convert([(linear, row)])

    def _finish(self, quantized: Iterable[Quantized]) -> None:
        """Convert linears after their block was replayed, unless the whole model will be trained."""
        if self.cfg.distillation is None:
            self._convert(quantized)
        else:
            self.held += quantized

    def _convert(self, quantized: Iterable[Quantized]) -> None:
        """Convert linears to the configured execution, and add their rows to the result."""
        for linear, row in quantized:
            if self.cfg.save is not None and isinstance(linear.packed, QTensor):
                self.result.weights[row["name"]] = linear.packed
            if kernel := convert(linear, self.cfg.execution):
                self.result.kernels.add(kernel)
            self.result.layers.append(row)

    def _needs(self) -> list[type[Stat]]:
        needs = set(self.step.needs)
        if self.quantizes:
            needs |= {Sample} | ({MinMax} if self.cfg.static else set()) | ({Hessian} if self.cfg.ranks else set())
        return sorted(needs, key=lambda cls: cls.__qualname__)


def same_function(label: str, before: Tensor, after: Tensor, what: str, limits: Limits = SAME_FUNCTION) -> None:
    """Check that a rewrite by the step `label` changed the tensor `what` by no more than rounding.

    Raises: ValueError with the measured error if it did.
    """
    error, limit = relative_error(after, before), limits[before.dtype]
    if not within(error, limit):
        raise ValueError(
            f"method.{label}: the rewrite changed the float model's function: the relative error of {what} is "
            f"{error:.2g}; expected at most {limit:g}; use a method that does not rewrite, such as gptq"
        )


def _mean_error(quantized: list[Quantized]) -> str:
    errors = [row["output_error"] for _, row in quantized if "output_error" in row]
    return f", error {sum(errors) / len(errors):.3f}" if errors else ""


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: "0-3" if they are consecutive, else "0,2,3"."""
    text = ",".join(map(str, numbers))
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        text = f"{numbers[0]}-{numbers[-1]}"
    return text
