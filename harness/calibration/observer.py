"""Statistics of the inputs of a block's linears: read from the cache, or computed by running the block."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from harness.calibration.importance import Importance
from harness.calibration.reference import Reference
from harness.calibration.replay import Stream
from harness.core import InputGroup, Stat, Stats
from harness.nn import tensors_of
from harness.utils.digests import digest, machine, module_digest, tensor_digest
from harness.utils.disk_cache import DiskCache
from harness.utils.syntax import code_digest


class Observer:
    """Collects statistics block by block and advances the stream.

    names   the linears to observe, of all blocks
    keep    each block receives the outputs of the unchanged block before it; else, of that block after its changes
    always  run blocks even if all their statistics are cached, because more than the statistics needs activations
    importance  weights of the tokens; None: all count alike
    """

    def __init__(  # noqa: PLR0913 - the settings of one pass
        self,
        stream: Stream,
        cache: DiskCache,
        names: Sequence[str],
        needs: Sequence[type[Stat]],
        keep: bool,
        always: bool,
        importance: Importance | None = None,
    ) -> None:
        self.stream, self.cache, self.needs, self.keep = stream, cache, needs, keep
        self.device = stream.states[0].device
        self._stores = cache.limit > 0  # else nothing has a name, which would be a hash of weights and inputs
        inputs_digest = tensor_digest(*stream.states, *tensors_of(stream.calls[0])) if self._stores else ""
        self._importance = importance
        weights_digest = tensor_digest(*importance.tensors) if importance and self._stores else ""
        self._chain = digest(inputs_digest, str(self.device), *names, *filter(None, [weights_digest]))
        self._block = ""  # digest of the block at its first observation, before it changes
        self._outputs: list[Tensor] | None = None
        # Outputs of an unchanged block cannot be computed later, so either all blocks skip their pass or none does.
        self._running = always or (keep and not self._all_cached())

    def observe(self, groups: Sequence[InputGroup], reference: Reference | None = None) -> list[Stats]:
        """The needed statistics of each group's input, from the block in its present state.

        `reference` has the inputs of the float model, for statistics that compare with them; None: they are the same.
        """
        block = self._digest()
        self._block = self._block or block
        inputs_and_block = digest(self._chain, block)
        stats = [Stats(self.needs, group.in_features) for group in groups]
        label = "" if self.keep else " ".join(group.name for group in groups)
        keys = {cls: _key(inputs_and_block, cls, label) for cls in self.needs if cls.cached}
        missing = {cls for cls in self.needs if cls not in keys or not self._load(keys[cls], cls, stats)}
        last = self.stream.position == len(self.stream.blocks) - 1  # no block reads its outputs
        needs_outputs = self.keep and self._running and self._outputs is None and not last
        if missing or needs_outputs:
            self._running = True
            self._run(groups, stats, missing, needs_outputs, reference)
        for cls in missing & keys.keys():
            self.cache.save(keys[cls], {f"{i}.{name}": value for i, name, value in _states(cls, stats)})
        return stats

    def advance(self) -> None:
        """Move the stream to the next block."""
        block = self._block if self.keep else ""  # later blocks depend on the unchanged block, whose digest is known
        self._chain = digest(self._chain, block or self._digest())
        self.stream.advance(self._outputs)
        self._outputs, self._block = None, ""
        if self._running and self.stream.position < len(self.stream.blocks):
            self.stream.catch_up()

    def _run(
        self,
        groups: Sequence[InputGroup],
        stats: list[Stats],
        missing: set[type[Stat]],
        keep: bool,
        reference: Reference | None,
    ) -> None:
        readers = [next(iter(group.linears.values())) for group in groups] if missing else []
        compared = reference if any(cls.compares for cls in missing) else None
        weights: list[Iterator[Tensor]] = []

        def begin(index: int) -> None:
            if compared is not None:
                compared.read(index, readers)
            if self._importance is not None:
                weights[:] = [self._importance.of(group.linears, index) for group in groups]

        def watcher(place: int) -> Callable[[Tensor], None]:
            def watch(inputs: Tensor) -> None:
                exact = compared.next_input(readers[place]) if compared else None
                stats[place].update(inputs, exact, next(weights[place]) if weights else None, missing)

            return watch

        watchers = {reader: watcher(place) for place, reader in enumerate(readers)}
        outputs = self.stream.outputs(watchers, keep, begin)
        if keep:
            self._outputs = outputs

    def _digest(self) -> str:
        """Hash of the block in its present state."""
        return module_digest(self.stream.blocks[self.stream.position]) if self._stores else ""

    def _all_cached(self) -> bool:
        if not self._stores:
            return False
        chain = self._chain
        for block in self.stream.blocks:
            block_digest = module_digest(block)
            keys = [_key(digest(chain, block_digest), cls, "") for cls in self.needs if cls.cached]
            if len(keys) < len(self.needs) or not all(map(self.cache.has, keys)):
                return False
            chain = digest(chain, block_digest)
        return True

    def _load(self, key: str, cls: type[Stat], stats: list[Stats]) -> bool:
        entry = self.cache.load(key) if self.cache.has(key) else None
        if entry is None:
            return False
        for i, group_stats in enumerate(stats):
            state = {name.removeprefix(f"{i}."): value for name, value in entry.items() if name.startswith(f"{i}.")}
            group_stats[cls].restore(state, self.device)
        return True


@functools.cache
def stat_identity(cls: type[Stat]) -> str:
    """Hash of everything except the inputs that decides a statistic: its source code and the machine's arithmetic."""
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    return digest(cls.__qualname__, code_digest(ast.parse(source)), *machine())


def _key(inputs_and_block: str, cls: type[Stat], group: str) -> str:
    return digest(inputs_and_block, stat_identity(cls), group)


def _states(cls: type[Stat], stats: list[Stats]) -> Iterator[tuple[int, str, Tensor]]:
    for i, group_stats in enumerate(stats):
        for name, value in group_stats[cls].state().items():
            yield i, name, value
