"""One pass of a method's step over the blocks of a model: observe, transform, quantize, replay."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field

from torch import Tensor

from harness.calibration import (
    PROBE_TOKENS,
    Importance,
    Observer,
    Reference,
    Stream,
    groups_of,
    shortcuts,
    verify,
)
from harness.config import RunConfig
from harness.core import InputGroup, Method, QTensor, Scheme, Stats
from harness.models import Decoder
from harness.quantization.blocks import block_of
from harness.quantization.distill import distill
from harness.quantization.finetune import finetune
from harness.quantization.install import recorded, row_of
from harness.quantization.installer import Installer, Quantized
from harness.quantization.producers import Discovery
from harness.quantization.result import Result
from harness.quantization.role import Role
from harness.quantization.same_function import same_function
from harness.quantization.scale_search import Trial
from harness.quantization.teacher import teacher_of
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track


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

    @property
    def step(self) -> Method:
        return self.cfg.steps[self.label]

    @functools.cached_property
    def role(self) -> Role:
        """What the step does in this run."""
        return Role(self.cfg, self.label)

    @functools.cached_property
    def installer(self) -> Installer:
        """What puts quantized linears into the model."""
        return Installer(self.decoder.model, self.cfg, self.schemes, self.result)

    def run(self, tokens: Tensor, track: Track, cache: DiskCache) -> None:
        """Quantize, or rewrite, all blocks; and train the quantized model as a whole, if the method does."""
        options = self.cfg.distillation if self.role.quantizes else None
        teacher = teacher_of(self.decoder, tokens) if options else None
        if self.role.by_data:
            self.by_blocks(tokens, track, cache)
        elif self.role.quantizes:
            self.at_once(track)
        if options and teacher:
            self.result.distilled = distill(self.decoder, tokens, teacher, options, track, self.installer.exact)
            self.installer.release()

    def at_once(self, track: Track) -> None:
        """Quantize all linears one by one, without data."""
        for name in track(self.names, self.label, len(self.names)):
            self.installer.finish([self.installer.install(name, self.step.quantize, Stats())])

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
        searches = self.role.transforms and self.step.searches
        importance = Importance(self.decoder, tokens, self.names) if self.role.weights else None
        observer = Observer(stream, cache, self.names, self.role.needs, not self.role.follows, searches, importance)
        teacher = stream.copy() if self.role.learns else None
        return _Streams(observer, probe, teacher)

    def _block(self, streams: _Streams) -> list[Quantized]:
        """Transform, quantize and train the block at the streams' position, and advance them past it."""
        stream, probe, teacher = streams.observer.stream, streams.probe, streams.teacher
        groups = groups_of(self.decoder, self.names, probe, self.cfg.scheme, self.schemes)
        expected = probe.run(probe.states[0])
        if self.role.sequential and not self.role.transforms:  # else inputs are observed before the transforms
            stream.shortcuts = shortcuts(stream.blocks[stream.position], lambda: probe.run(probe.states[0]))
        if self.role.transforms:
            self._find_producers(probe, groups)
        reference = Reference(teacher) if teacher else None
        quantized = self._rewrite(streams, groups, expected, reference)
        if reference:
            if self.step.finetune:
                self._finetune(stream, reference.targets, groups, quantized)
            reference.advance()
        streams.observer.advance()
        probe.advance([expected])
        self.installer.finish(quantized)
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
        stats = observer.observe(groups, reference) if self.role.transforms or not self.role.sequential else []
        if self.role.transforms:
            for group, group_stats in zip(groups, stats, strict=True):
                self._transform(group, group_stats, observer.stream)
            transformed = probe.run(probe.states[0])
            same_function(self.label, expected, transformed, f"the output of block {probe.position}")
            self._hold(reference)
        if self.role.solves and reference and groups:  # a block may have no linear that is quantized
            return self._solve(observer.stream, groups, stats, reference)
        quantized = []
        for i, group in enumerate(groups if self.role.quantizes else ()):
            group_stats = observer.observe([group], reference)[0] if self.role.sequential else stats[i]
            quantized += [self.installer.install(name, self.role.quantize, group_stats) for name in group.linears]
        return quantized

    def _solve(
        self, stream: Stream, groups: list[InputGroup], stats: list[Stats], reference: Reference
    ) -> list[Quantized]:
        """Quantize all linears of a block together."""
        by_name = {name: each for group, each in zip(groups, stats, strict=True) for name in group.linears}
        schemes = {name: self.installer.scheme(name) for name in by_name}
        block = block_of(self.decoder.model, stream, reference, schemes, by_name)
        with recorded(self.decoder.name(stream.position), self.result.warnings):
            adjusted = {name: self.role.adjust(block.weights[name], schemes[name], by_name[name]) for name in by_name}
            solved = self.step.quantize_block(dataclasses.replace(block, weights=adjusted))
        if missing := [name for name in by_name if name not in solved]:
            raise ValueError(f"method.{self.label}: quantize_block returned no weight for {missing[0]}")
        return [
            self.installer.install(name, lambda *_, name=name: solved[name], each) for name, each in by_name.items()
        ]

    def _hold(self, reference: Reference | None) -> None:
        """Keep the block in its present state for statistics that compare with it."""
        if reference and self.role.compares:
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


def _mean_error(quantized: list[Quantized]) -> str:
    errors = [row["output_error"] for _, row in quantized if "output_error" in row]
    return f", error {sum(errors) / len(errors):.3f}" if errors else ""


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers as text: "0-3" if they are consecutive, else "0,2,3"."""
    text = ",".join(map(str, numbers))
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        text = f"{numbers[0]}-{numbers[-1]}"
    return text
