"""Apply a method's steps to a model, each in one pass over its blocks.

A composite is its steps, run one after another. A step that only rewrites sees the float model, whose function it
keeps. The one that quantizes sees the inputs that quantized blocks before hand on (`engine.propagate=quantized`,
as GPTQ's authors) or those of the float model (`float`, as AWQ's).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration.observer import Observer
from harness.calibration.replay import Stream, logits, moved_by, verify
from harness.calibration.shortcut import shortcuts
from harness.calibration.survey import PROBE_TOKENS, groups_of
from harness.config.schema import RunConfig
from harness.core.method import InputGroup, Method, overrides
from harness.core.qtensor import QTensor
from harness.core.scheme import Scheme
from harness.core.stats import Hessian, MinMax, Sample, Stat, Stats
from harness.models.architecture import block_prefix, linears, matching, split_skipped, uncovered, weight_of
from harness.nn.linear import QuantLinear
from harness.quantization.finetune import finetune
from harness.quantization.install import float_row, install, recorded, row_of
from harness.quantization.producers import Discovery
from harness.quantization.residual_stream import discover, untied
from harness.quantization.scale_search import Trial
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent

Row = dict[str, Any]

# How far a block's output, or the logits, may move under a rewrite that keeps the function: relative Frobenius error.
_SAME_FUNCTION = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# And a rotation, which is exact but for rounding.
_SAME_TURNED = _SAME_FUNCTION | {torch.float32: 1e-4}
_NO_CACHE = DiskCache(Path(), 0)


@dataclass
class Result:
    """What the record keeps of a quantization: a row for each linear of the blocks, warnings, names of kernels.

    `weights` are the QTensors by their linear's name, where the run is to save them. `floats` are the float linears
    that the quantized ones took the place of, as rewrites left them, where the run is to be analysed; `renamed` says
    what the rewrites call each linear, old name to new.
    """

    layers: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    weights: dict[str, QTensor] = field(default_factory=dict)
    floats: dict[str, nn.Module] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, of all linears in decoder blocks, those left float included."""
        bits = sum(layer["stored_bits"] for layer in self.layers)
        return float(bits / sum(layer["shape"][0] * layer["shape"][1] for layer in self.layers))


def check(model: nn.Module, cfg: RunConfig) -> None:
    """Check scheme and method against each other and against the shapes of a model, which may be without weights.

    Raises: ValueError naming the linear that does not fit, or a `skip` pattern that matches nothing.
    """
    found = linears(model)
    if not found:
        raise ValueError(f"model={cfg.model.name} has no linear inside its decoder blocks; nothing to quantize")
    if cfg.scheme is None:
        return
    for label, step in cfg.steps.items():
        try:
            for scheme in map(cfg.scheme.at, cfg.mixed.widths) if cfg.mixes else [cfg.scheme]:
                step.check(scheme)
        except ValueError as error:
            raise ValueError(f"method.{label}: {error}") from error
    matching(list(found), cfg.analysis.outliers, "analysis.outliers")
    for name in split_skipped(list(found), cfg.skip)[0]:
        rows, columns = weight_of(found[name]).shape
        try:
            cfg.scheme.weight.groups((rows, columns))
        except ValueError as error:
            raise ValueError(str(error).replace("; use", f" of {name}; use", 1)) from error


@torch.no_grad()
def quantize(
    model: nn.Module,
    cfg: RunConfig,
    tokens: Tensor,
    track: Track = silent,
    cache: DiskCache = _NO_CACHE,
    widths: Mapping[str, int] | None = None,
) -> Result:
    """Run the steps of `cfg` on `model`, in place; no steps leave it as it is.

    `tokens` (B, T) int64 are the calibration sequences, or, where nothing needs them, any text of the model's:
    rewrites are proved on it. `widths` are the bits of linears, by their names in the float model, that have others
    than the scheme's.
    Raises: ValueError if a step changes the function of the float model, or cannot quantize a weight.
    """
    result = Result(warnings=[f"{name} is no linear and stays float" for name in uncovered(model)])
    found = linears(model)
    names, skipped = split_skipped(list(found), cfg.skip) if cfg.steps else ([], list(found))
    rescaled: dict[str, str] = {}
    schemes = {name: cfg.scheme.at(bits) for name, bits in (widths or {}).items()} if cfg.scheme else {}
    result.renamed = dict(zip(names, names, strict=True))
    for label, step in cfg.steps.items():
        if overrides(step, "prepare"):
            _prepare(model, label, step, tokens, result.warnings)
        if overrides(step, "rotate"):
            renamed = _rotate(model, label, step, tokens, result.warnings)
            found = linears(model)
            names, skipped = ([renamed.get(name, name) for name in some] for some in (names, skipped))
            rescaled = {renamed.get(name, name): by for name, by in rescaled.items()}
            schemes = {renamed.get(name, name): scheme for name, scheme in schemes.items()}
            result.renamed = {old: renamed.get(name, name) for old, name in result.renamed.items()}
        part = _Pass(model, cfg, label, names, result, rescaled, schemes)
        if overrides(step, "transform") or (part.quantizes and (step.needs or cfg.static or cfg.ranks)):
            part.by_blocks(tokens, track, cache)
        elif part.quantizes:
            part.at_once(track)
    for row in result.layers:
        row |= {"rescaled_by": rescaled[row["name"]]} if row["name"] in rescaled else {}
    result.layers += [float_row(name, weight_of(found[name])) for name in skipped]
    return result


def _prepare(model: nn.Module, label: str, step: Method, tokens: Tensor, notes: list[str]) -> None:
    probe = tokens[:1, :PROBE_TOKENS]
    before = logits(model, probe)
    with recorded(f"method.{label}", notes):
        step.prepare(model)
    _same_function(label, before, logits(model, probe), "logits")


def _rotate(model: nn.Module, label: str, step: Method, tokens: Tensor, notes: list[str]) -> dict[str, str]:
    """Let a step turn the residual stream; returns the linears that it gave another name, old name to new."""
    probe = tokens[:1, :PROBE_TOKENS]
    before = logits(model, probe)
    try:
        residual = discover(model, probe)
    except ValueError as error:
        raise ValueError(f"method.{label}: {error}") from error
    with recorded(f"method.{label}", notes):
        step.rotate(residual)
    untied(model)
    _same_function(label, before, logits(model, probe), "logits", _SAME_TURNED)
    return residual.renamed


@dataclass
class _Pass:
    """One step's way over the blocks of a model.

    `rescaled` takes, for each linear whose input was rescaled, the producers that absorbed it. `schemes` are the
    formats of linears that have one of their own.
    """

    model: nn.Module
    cfg: RunConfig
    label: str
    names: list[str]
    result: Result
    rescaled: dict[str, str]
    schemes: dict[str, Scheme]

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
    def follows(self) -> bool:
        """Whether blocks hand on what they give once quantized, because statistics decide what later ones become."""
        decided = self.quantizes and overrides(self.step, "quantize") and bool(self.step.needs)
        return decided and self.cfg.engine.propagate == "quantized"

    def at_once(self, track: Track) -> None:
        """Quantize linear after linear, where no data is needed."""
        for name in track(self.names, self.label, len(self.names)):
            linear, row = self._install(name, Stats())
            self._finish([(linear, row)])

    def by_blocks(self, tokens: Tensor, track: Track, cache: DiskCache) -> None:
        """Observe, transform, quantize and replay each block."""
        verify(self.model, tokens[:1, :PROBE_TOKENS])
        stream, probe = Stream(self.model, tokens), Stream(self.model, tokens[:1, :PROBE_TOKENS])
        observer = Observer(
            stream,
            cache,
            self.names,
            self._needs(),
            keep=not self.follows,
            always=self.transforms and self.step.searches,
        )
        teacher = Stream(self.model, tokens) if self.step.finetune and self.quantizes else None
        discovery, unscaled = Discovery(), dict[str, list[int]]()
        total, shown = len(stream.blocks), [f"{self.label} block 1/{len(stream.blocks)}"]
        for index in track(range(total), lambda: shown[0], total):
            prefix = f"{block_prefix(self.model)}.{index}."
            groups = groups_of(self.model, self.names, probe, prefix, self.cfg.scheme, self.schemes)
            expected = probe.run(probe.states[0])
            if self.follows and self.step.sequential:
                stream.shortcuts = shortcuts(stream.blocks[index], lambda: probe.run(probe.states[0]))
            if self.transforms:
                discovery.producers(probe, groups, prefix)
                for group in groups:
                    if group.producer is None:
                        unscaled.setdefault(group.name.replace(prefix, ""), []).append(index)
            targets = teacher.outputs({}, keep=True) if teacher else []
            done = self._block(observer, groups, probe, expected)
            if teacher:
                self._finetune(stream, targets, groups, done)
                teacher.advance(targets)
            observer.advance()
            probe.advance([expected])
            self._finish(done)
            shown[0] = f"{self.label} block {min(index + 2, total)}/{total}{_mean_error(done)}"
        self.result.warnings += [
            f"method.{self.label}: nothing was proved to absorb a scale for {members} in blocks {_ranges(blocks)}; "
            "their inputs stay as they are"
            for members, blocks in unscaled.items()
        ]

    def _block(
        self, observer: Observer, groups: list[InputGroup], probe: Stream, expected: Tensor
    ) -> list[tuple[QuantLinear, Row]]:
        """One block's groups, transformed and quantized."""
        sequential = self.follows and self.step.sequential
        stats = observer.observe(groups) if self.transforms or not sequential else []
        if self.transforms:
            for group, seen in zip(groups, stats, strict=True):
                self._transform(group, seen, observer.stream)
            moved = probe.run(probe.states[0])
            _same_function(self.label, expected, moved, f"the output of block {probe.position}")
        done = []
        for i, group in enumerate(groups if self.quantizes else ()):
            seen = observer.observe([group])[0] if sequential else stats[i]
            done += [self._install(name, seen) for name in group.linears]
        return done

    def _transform(self, group: InputGroup, stats: Stats, stream: Stream) -> None:
        if self.step.searches:
            group.trial = Trial(stream, self.model, group, stats, self.cfg.engine.search_tokens)
        with recorded(group.name, self.result.warnings):
            self.step.transform(group, stats)
        group.trial = None  # it holds activations
        if group.scale is not None and group.producer is not None:
            stats.rescale(group.scale)
            for name in group.linears:
                known = self.rescaled.get(name)
                self.rescaled[name] = f"{known}, {group.producer.name}" if known else group.producer.name

    def _finetune(
        self, stream: Stream, targets: list[Tensor], groups: list[InputGroup], done: list[tuple[QuantLinear, Row]]
    ) -> None:
        """Train the block that has just been quantized, and bring its rows up to date."""
        assert self.step.finetune is not None
        block = stream.blocks[stream.position]
        stream.shortcuts = ()  # they answer for the block as it was
        found = finetune(block, stream.run_to_train, stream.states, targets, self.step.finetune)
        if found is None:
            return
        weights = {name: weight for group in groups for name, weight in group.weights.items()}
        for linear, row in done:
            assert isinstance(linear.packed, QTensor)
            row |= row_of(row["name"], weights[row["name"]], linear.packed)
            row.pop("hessian_error", None)  # of the weight before
            row |= {"block_error": found.after, "block_error_untuned": found.before}

    def _install(self, name: str, stats: Stats) -> tuple[QuantLinear, Row]:
        scheme = self.schemes.get(name, self.cfg.scheme)
        assert scheme is not None
        if self.cfg.analyses:
            self.result.floats[name] = self.model.get_submodule(name)
        linear, row = install(self.model, name, self.step, scheme, stats, self.result.warnings)
        return linear, row | ({"bits": scheme.weight.bits} if name in self.schemes else {})

    def _finish(self, done: Iterable[tuple[QuantLinear, Row]]) -> None:
        """Keep what the execution asks for, now that the block has been replayed."""
        for linear, row in done:
            if self.cfg.save is not None and isinstance(linear.packed, QTensor):
                self.result.weights[row["name"]] = linear.packed
            if self.cfg.execution == "packed":
                self.result.kernels.add(linear.pack().kernel)
            else:
                linear.simulate()
            self.result.layers.append(row)

    def _needs(self) -> list[type[Stat]]:
        needs = set(self.step.needs)
        if self.quantizes:
            needs |= {Sample} | ({MinMax} if self.cfg.static else set()) | ({Hessian} if self.cfg.ranks else set())
        return sorted(needs, key=lambda cls: cls.__qualname__)


def _same_function(
    label: str, before: Tensor, after: Tensor, what: str, limits: Mapping[torch.dtype, float] = _SAME_FUNCTION
) -> None:
    moved, limit = moved_by(after, before), limits[before.dtype]
    if not moved <= limit:
        raise ValueError(
            f"method.{label} changed the float model's function: {what} moved by {moved:.2g} relative; "
            f"expected at most {limit:g}, a rewrite must keep it"
        )


def _mean_error(done: list[tuple[QuantLinear, Row]]) -> str:
    errors = [row["output_error"] for _, row in done if "output_error" in row]
    return f", error {sum(errors) / len(errors):.3f}" if errors else ""


def _ranges(numbers: list[int]) -> str:
    """Numbers in few words: 0-3, 5."""
    text = ",".join(map(str, numbers))
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1:
        text = f"{numbers[0]}-{numbers[-1]}"
    return text
