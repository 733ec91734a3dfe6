"""Last hidden states of every window, on disk: a run's own while it lasts, the float model's for all of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import overload

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.calibration import PROBE_TOKENS
from harness.utils.digests import digest, machine
from harness.utils.disk_cache import DiskCache

_NAME, _LOGITS = "states", "logits"
_PROBE = "probe"


class Spool(Sequence[Tensor]):
    """Tensors that are appended to a folder, a file each, and read back when asked for.

    Once they exceed `limit` bytes together, or the disk is full, nothing more is taken and `refused` says why.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.refused = ""
        self._sizes: list[int] = []

    def append(self, states: Tensor) -> None:
        """Keep one more, if there is room."""
        if self.refused:
            return
        if sum(self._sizes) + states.nbytes > self.limit:
            self.refused = (
                f"{len(self) + 1} windows of states alone take {states.nbytes / 2**30 * (len(self) + 1):.2g} GiB"
            )
            return
        try:
            save_file({_NAME: states.contiguous().cpu()}, self._path(len(self)))
            self._sizes.append(states.nbytes)
        except (OSError, SafetensorError) as error:
            self.refused = " ".join(str(error).split())

    def clear(self) -> None:
        """Forget all; their files are written over."""
        self._sizes.clear()

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return load_file(self._path(index))[_NAME]

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.safetensors"


@contextmanager
def spool(place: Path, limit: int) -> Iterator[Spool]:
    """A spool of at most `limit` bytes in a folder of its own under `place`, which is gone afterwards."""
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="states-", dir=place) as name:
        yield Spool(Path(name), limit)


class FloatStates:
    """The float model's states of one stream, computed once and shared by every run that compares itself with it.

    `decides` is all that they follow from; what the machine and its libraries add is known here.
    """

    def __init__(self, cache: DiskCache, decides: Sequence[str], count: int) -> None:
        self.cache, self.count = cache, count
        self.key = digest(*decides, *machine())

    def publish(self, states: Sequence[Tensor], tail: Callable[[Tensor], Tensor]) -> None:
        """Keep them for other runs, as far as there is room, and what the float model's tail makes of the first."""
        for i, each in enumerate(states):
            if not self.cache.has(self._name(i)):
                self.cache.save(self._name(i), {_NAME: each})
        if states and not self.cache.has(self._name(_PROBE)):
            start = states[0][:PROBE_TOKENS]
            self.cache.save(self._name(_PROBE), {_NAME: start, _LOGITS: tail(start)})

    def vouch_for(self, tail: Callable[[Tensor], Tensor]) -> bool:
        """Whether all states are kept, and `tail` makes of them what the float model's does, to the bit.

        Then a quantized model's own tail, which most methods leave alone, gives the float model's logits, and the float
        model need not be there.
        """
        if not all(self.cache.has(self._name(i)) for i in range(self.count)):
            return False
        probe = self.cache.load(self._name(_PROBE))
        return probe is not None and torch.equal(tail(probe[_NAME]).cpu(), probe[_LOGITS])

    def fill(self, target: Spool, compute: Callable[[Callable[[Tensor], None]], object]) -> None:
        """Put the states into `target`: those that are kept, or what `compute` hands to the function that it is given.

        Of several processes that lack them, one computes and the others wait for it.
        """
        if self._kept(target):
            return
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache.folder / f"{self.key[:16]}.lock"):
            if self._kept(target):
                return
            compute(target.append)

    def _kept(self, target: Spool) -> bool:
        if not all(self.cache.has(self._name(i)) for i in range(self.count)):
            return False
        for i in range(self.count):
            found = self.cache.load(self._name(i))
            if found is None:  # forgotten by now, to make room
                target.clear()
                return False
            target.append(found[_NAME])
        return True

    def _name(self, index: int | str) -> str:
        return digest(self.key, str(index))
