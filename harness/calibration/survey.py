"""Statistics of every input in a model as it is, block after block, without changing anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from harness.calibration.observer import Observer
from harness.calibration.replay import Stream, verify
from harness.core.rewrite import InputGroup
from harness.core.scheme import Scheme
from harness.core.stats import Stat, Stats
from harness.models.architecture import block_prefix, input_groups, linears, weight_of
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent

PROBE_TOKENS = 32  # enough to prove a rewrite on, few enough to cost nothing beside calibration

Surveyed = Iterator[tuple[list[InputGroup], list[Stats]]]


def survey(
    model: nn.Module,
    tokens: Tensor,
    names: Sequence[str],
    needs: Sequence[type[Stat]],
    cache: DiskCache,
    track: Track = silent,
) -> Surveyed:
    """The input groups of each block, and what `needs` names of their inputs over `tokens` (B, T), block by block.

    `names` are the linears that matter; a block without any is left out.
    """
    verify(model, tokens[:1, :PROBE_TOKENS])
    stream, probe = Stream(model, tokens), Stream(model, tokens[:1, :PROBE_TOKENS])
    observer = Observer(stream, cache, names, needs, keep=True, always=False)
    total = len(stream.blocks)
    for index in track(range(total), "observe", total):
        groups = groups_of(model, names, probe, f"{block_prefix(model)}.{index}.")
        if groups:
            yield groups, observer.observe(groups)
        observer.advance()
        probe.advance()


def groups_of(
    model: nn.Module,
    names: Sequence[str],
    probe: Stream,
    prefix: str,
    scheme: Scheme | None = None,
    schemes: Mapping[str, Scheme] | None = None,
) -> list[InputGroup]:
    """The input groups of the block at the probe's position, in execution order; those without any of `names` are none.

    `schemes` are formats of linears that have one of their own.
    """
    found = {name: module for name, module in linears(model).items() if name.startswith(prefix)}
    groups = []
    for members in input_groups(found, lambda: probe.run(probe.states[0])):
        kept = {name: found[name] for name in members if name in names}
        weights = {name: weight_of(module) for name, module in kept.items()}
        others = {name: weight_of(found[name]) for name in members if name not in kept}
        own = {name: schemes[name] for name in kept if schemes and name in schemes}
        if kept:
            groups.append(InputGroup(kept, weights, others, scheme, own))
    return groups
