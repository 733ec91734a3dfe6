"""One step of a method on its way over the blocks of a model: observe, transform, quantize, replay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from harness.calibration import (
    PROBE_TOKENS,
    SAME_FUNCTION,
    Observer,
    Stream,
    groups_of,
    relative_error,
    shortcuts,
    verify,
    within,
)
from harness.calibration.proofs import Limits
from harness.config import RunConfig
from harness.core import Hessian, InputGroup, Method, MinMax, QTensor, Sample, Scheme, Stat, Stats, overrides
from harness.models import Decoder
from harness.nn import QuantLinear
from harness.quantization.finetune import finetune
from harness.quantization.install import install, recorded, row_of
from harness.quantization.producers import Discovery
from harness.quantization.result import Result, Row
from harness.quantization.scale_search import Trial
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track


@dataclass
class Pass:
    """One step's way over the blocks of a model.

    `rescaled` takes, for each linear whose input was rescaled, the producers that absorbed it. `schemes` are the
    formats of linears that have one of their own.
    """

    decoder: Decoder
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
        verify(self.decoder, tokens[:1, :PROBE_TOKENS])
        stream, probe = Stream(self.decoder, tokens), Stream(self.decoder, tokens[:1, :PROBE_TOKENS])
        observer = Observer(
            stream,
            cache,
            self.names,
            self._needs(),
            keep=not self.follows,
            always=self.transforms and self.step.searches,
        )
        teacher = Stream(self.decoder, tokens) if self.step.finetune and self.quantizes else None
        discovery, unscaled = Discovery(), dict[str, list[int]]()
        total, shown = len(stream.blocks), [f"{self.label} block 1/{len(stream.blocks)}"]
        for index in track(range(total), lambda: shown[0], total):
            prefix = f"{self.decoder.name(index)}."
            groups = groups_of(self.decoder, self.names, probe, self.cfg.scheme, self.schemes)
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
            same_function(self.label, expected, moved, f"the output of block {probe.position}")
        done = []
        for i, group in enumerate(groups if self.quantizes else ()):
            seen = observer.observe([group])[0] if sequential else stats[i]
            done += [self._install(name, seen) for name in group.linears]
        return done

    def _transform(self, group: InputGroup, stats: Stats, stream: Stream) -> None:
        if self.step.searches:
            group.trial = Trial(stream, self.decoder.model, group, stats, self.cfg.engine.search_tokens)
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
            self.result.floats[name] = self.decoder.model.get_submodule(name)
        linear, row = install(self.decoder.model, name, self.step, scheme, stats, self.result.warnings)
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


def same_function(label: str, before: Tensor, after: Tensor, what: str, limits: Limits = SAME_FUNCTION) -> None:
    """Raises: ValueError if a rewrite by the step `label` moved a tensor by more than rounding."""
    moved, limit = relative_error(after, before), limits[before.dtype]
    if not within(moved, limit):
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
