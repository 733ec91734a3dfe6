"""Statistics of every input group of a model, block by block; the model stays unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from harness.calibration.observer import Observer
from harness.calibration.proofs import PROBE_TOKENS
from harness.calibration.replay import Stream, verify
from harness.core import InputGroup, Scheme, Stat, Stats
from harness.models import Decoder, input_groups, weight_of
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent

Surveyed = Iterator[tuple[list[InputGroup], list[Stats]]]


def survey(
    decoder: Decoder,
    tokens: Tensor,
    names: Sequence[str],
    needs: Sequence[type[Stat]],
    cache: DiskCache,
    track: Track = silent,
) -> Surveyed:
    """Yield each block's input groups and the statistics `needs` of their inputs over `tokens` (B, T).

    `names` are the linears to observe; a block without any of them is left out.
    """
    verify(decoder, tokens[:1, :PROBE_TOKENS])
    stream, probe = Stream(decoder, tokens), Stream(decoder, tokens[:1, :PROBE_TOKENS])
    observer = Observer(stream, cache, names, needs, keep=True, always=False)
    total = len(stream.blocks)
    for _ in track(range(total), "observe", total):
        groups = groups_of(decoder, names, probe)
        if groups:
            yield groups, observer.observe(groups)
        observer.advance()
        probe.advance()


def groups_of(
    decoder: Decoder,
    names: Sequence[str],
    probe: Stream,
    scheme: Scheme | None = None,
    schemes: Mapping[str, Scheme] | None = None,
) -> list[InputGroup]:
    """The input groups of the block at the probe's position, in execution order.

    A group without any linear of `names` is left out. `schemes` are the schemes of linears that differ from `scheme`.
    """
    linears = decoder.linears(probe.position)
    groups = []
    for members in input_groups(linears, lambda: probe.run(probe.states[0])):
        selected = {name: linears[name] for name in members if name in names}
        weights = {name: weight_of(module) for name, module in selected.items()}
        others = {name: weight_of(linears[name]) for name in members if name not in selected}
        different = {name: schemes[name] for name in selected if schemes and name in schemes}
        if selected:
            groups.append(InputGroup(selected, weights, others, scheme, different))
    return groups
