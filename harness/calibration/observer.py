"""Statistics of a block's inputs, from the cache where they were computed before, else by running the block."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from harness.calibration.replay import Stream
from harness.core import InputGroup, Stat, Stats
from harness.nn.hooks import tensors_of
from harness.utils.digests import digest, machine, module_digest, tensor_digest
from harness.utils.disk_cache import DiskCache


class Observer:
    """Collects statistics block after block, and moves the stream on.

    names   the linears that are observed, of all blocks
    keep    blocks hand on what they give before anything changes them; else what they give in the end
    always  activations are wanted for more than statistics, so that cached ones save no pass
    """

    def __init__(
        self,
        stream: Stream,
        cache: DiskCache,
        names: Sequence[str],
        needs: Sequence[type[Stat]],
        keep: bool,
        always: bool,
    ) -> None:
        self.stream, self.cache, self.needs, self.keep = stream, cache, needs, keep
        self.device = stream.states[0].device
        first = tensor_digest(*stream.states, *tensors_of(stream.calls[0]))
        self._chain = digest(first, str(self.device), *names)
        self._block = ""  # the digest of the block as it was when it was first observed
        self._outputs: list[Tensor] | None = None
        # Kept outputs are of blocks as they were: a pass over them is left out for all blocks, or for none.
        self._running = always or (keep and not self._all_cached())

    def observe(self, groups: Sequence[InputGroup]) -> list[Stats]:
        """The needed statistics of each group's input, with the block as it is now."""
        block = module_digest(self.stream.blocks[self.stream.position])
        self._block = self._block or block
        state = digest(self._chain, block)
        stats = [Stats(self.needs, group.in_features) for group in groups]
        label = "" if self.keep else " ".join(group.name for group in groups)
        keys = {cls: _key(state, cls, label) for cls in self.needs if cls.cached}
        missing = {cls for cls in self.needs if cls not in keys or not self._load(keys[cls], cls, stats)}
        last = self.stream.position == len(self.stream.blocks) - 1  # whose outputs enter no block
        keeping = self.keep and self._running and self._outputs is None and not last
        if missing or keeping:
            self._running = True
            self._run(groups, stats, missing, keeping)
        for cls in missing & keys.keys():
            self.cache.save(keys[cls], {f"{i}.{name}": value for i, name, value in _states(cls, stats)})
        return stats

    def advance(self) -> None:
        """Move the stream to the next block."""
        block = self._block if self.keep else ""  # hashed before, and it is what later blocks follow from
        self._chain = digest(self._chain, block or module_digest(self.stream.blocks[self.stream.position]))
        self.stream.advance(self._outputs)
        self._outputs, self._block = None, ""
        if self._running and self.stream.position < len(self.stream.blocks):
            self.stream.catch_up()

    def _run(self, groups: Sequence[InputGroup], stats: list[Stats], missing: set[type[Stat]], keep: bool) -> None:
        def watcher(seen: Stats) -> Callable[[Tensor], None]:
            return lambda inputs: seen.update(inputs, missing)

        watchers: dict[nn.Module, Callable[[Tensor], None]] = {}
        if missing:
            readers = [next(iter(group.linears.values())) for group in groups]
            watchers = {reader: watcher(seen) for reader, seen in zip(readers, stats, strict=True)}
        outputs = self.stream.outputs(watchers, keep)
        if keep:
            self._outputs = outputs

    def _all_cached(self) -> bool:
        chain = self._chain
        for block in self.stream.blocks:
            state = module_digest(block)
            keys = [_key(digest(chain, state), cls, "") for cls in self.needs if cls.cached]
            if len(keys) < len(self.needs) or not all(map(self.cache.has, keys)):
                return False
            chain = digest(chain, state)
        return True

    def _load(self, key: str, cls: type[Stat], stats: list[Stats]) -> bool:
        found = self.cache.load(key) if self.cache.has(key) else None
        if found is None:
            return False
        for i, seen in enumerate(stats):
            own = {name.removeprefix(f"{i}."): value for name, value in found.items() if name.startswith(f"{i}.")}
            seen[cls].restore(own, self.device)
        return True


@functools.cache
def stat_identity(cls: type[Stat]) -> str:
    """A hash of what decides a statistic besides its inputs: its source code and the machine's arithmetic."""
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    return digest(cls.__qualname__, source, *machine())


def _key(state: str, cls: type[Stat], group: str) -> str:
    return digest(state, stat_identity(cls), group)


def _states(cls: type[Stat], stats: list[Stats]) -> Iterator[tuple[int, str, Tensor]]:
    for i, seen in enumerate(stats):
        for name, value in seen[cls].state().items():
            yield i, name, value
