"""Last hidden states of each window, on disk: the quantized model's during one run, the float model's for many runs."""

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
    """A sequence of tensors in a folder, one file each: append to write, index to read.

    Once the tensors exceed `limit` bytes in total, or the disk is full, no more are stored and `refused` is the reason.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.refused = ""
        self._sizes: list[int] = []

    def append(self, states: Tensor) -> bool:
        """Store one more tensor, if there is room; returns whether it is stored."""
        if self.refused:
            return False
        if sum(self._sizes) + states.nbytes > self.limit:
            gib = states.nbytes / 2**30 * (len(self) + 1)
            self.refused = f"{len(self) + 1} windows of states take {gib:.2g} GiB"
            return False
        try:
            save_file({_NAME: states.contiguous().cpu()}, self._path(len(self)))
            self._sizes.append(states.nbytes)
        except (OSError, SafetensorError) as error:
            self.refused = " ".join(str(error).split())
        return not self.refused

    def clear(self) -> None:
        """Remove all tensors; later ones overwrite their files."""
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
def spool(parent: Path, limit: int) -> Iterator[Spool]:
    """A spool of at most `limit` bytes in a new folder below `parent`, which is deleted on exit."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="states-", dir=parent) as name:
        yield Spool(Path(name), limit)


class FloatStates:
    """The float model's states of one stream, computed once and shared by all runs that compare with this model.

    `decides` are the strings that determine the states; the machine and its libraries are added here.
    """

    def __init__(self, cache: DiskCache, decides: Sequence[str], count: int) -> None:
        self.cache, self.count = cache, count
        self.key = digest(*decides, *machine())

    def publish(self, states: Sequence[Tensor], tail: Callable[[Tensor], Tensor]) -> None:
        """Store the states for other runs, if there is room, and a probe: the tail's logits of the first positions."""
        for i, window_states in enumerate(states):
            if not self.cache.has(self._name(i)):
                self.cache.save(self._name(i), {_NAME: window_states})
        if states and not self.cache.has(self._name(_PROBE)):
            probe = states[0][:PROBE_TOKENS]
            logits = tail(probe).clone()  # the tail of a model that does not split returns its argument
            self.cache.save(self._name(_PROBE), {_NAME: probe.clone(), _LOGITS: logits})

    def vouch_for(self, tail: Callable[[Tensor], Tensor]) -> bool:
        """Whether all states are stored, and `tail` turns the probe into exactly the float model's logits.

        Most methods do not change the tail. Then the quantized model's tail gives the float model's logits from the
        stored states, and the float model need not be loaded.
        """
        if not all(self.cache.has(self._name(i)) for i in range(self.count)):
            return False
        probe = self.cache.load(self._name(_PROBE))
        return probe is not None and torch.equal(tail(probe[_NAME]).cpu(), probe[_LOGITS])

    def fill(self, target: Spool, compute: Callable[[Callable[[Tensor], object]], object]) -> None:
        """Fill `target` with the stored states, or let `compute` append the states of each window to it.

        If several processes need states that are not stored, one computes them and the others wait.
        """
        if self._copy(target):
            return
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache.folder / f"{self.key[:16]}.lock"):
            if self._copy(target):
                return
            compute(target.append)

    def _copy(self, target: Spool) -> bool:
        """Copy the stored states into `target`; returns False, with an empty target, if one of them is missing."""
        if not all(self.cache.has(self._name(i)) for i in range(self.count)):
            return False
        for i in range(self.count):
            tensors = self.cache.load(self._name(i))
            if tensors is None:  # deleted meanwhile, to make room
                target.clear()
                return False
            target.append(tensors[_NAME])
        return True

    def _name(self, index: int | str) -> str:
        return digest(self.key, str(index))
