"""What the float model computes on the evaluation windows: on disk, for all runs that compare with it."""

from __future__ import annotations

import ast
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from harness.config import RunConfig
from harness.evaluation import float_head, perplexity
from harness.evaluation.float_head import NOTHING_STORED, FloatHead
from harness.evaluation.hidden_states import FloatStates, Spool, spool
from harness.evaluation.perplexity import Scorer
from harness.models import Source
from harness.utils.disk_cache import DiskCache, cache_dir
from harness.utils.syntax import code_digest


@dataclass(frozen=True)
class Shared:
    """The stored hidden states and predictions of the float model of one configuration.

    windows, tokens_sha256  the evaluation tokens (W, T) and their hash
    device                  the device of the float model
    """

    cfg: RunConfig
    source: Source
    windows: Tensor
    tokens_sha256: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the float model."""
        return self.source.dtype(self.cfg.model.baseline_dtype)

    @cached_property
    def states(self) -> FloatStates:
        """The last hidden states of each window."""
        return FloatStates(self._cache, [*self._decides, _code(perplexity)], len(self.windows))

    def head(self, scorer: Scorer, states: Tensor) -> FloatHead:
        """The predictions at the scored positions; `scorer` and the `states` (T, D) of a window tell their size.

        Nothing is stored if those of all windows do not fit beside the states, or the float model is on a GPU, which
        computes them faster than a disk is read.
        """
        logits = scorer.logits(states[:1])
        size = len(self.windows) * (states.nbytes + (len(states) - 1 - self.cfg.data.unscored) * logits.nbytes)
        if size > self.limit or self.device.type != "cpu":
            return NOTHING_STORED
        unscored = str(self.cfg.data.unscored)
        return FloatHead(self._cache, [*self._decides, unscored, _code(perplexity), _code(float_head)])

    def spool(self) -> AbstractContextManager[Spool]:
        """A place for the states of one run, which is deleted on exit."""
        return spool(cache_dir() / "spool", self.limit)

    @property
    def limit(self) -> int:
        """Bytes of disk that the states and predictions may take."""
        return int(self.cfg.measure.divergence_gib * 2**30)

    @property
    def _cache(self) -> DiskCache:
        return DiskCache(cache_dir() / "float_states", self.limit)

    @property
    def _decides(self) -> list[str]:
        """Everything that determines the float model's states, except the code and the machine."""
        data, dtype = self.cfg.data, str(self.dtype).removeprefix("torch.")
        names = [self.source.fingerprint, self.tokens_sha256, str(data.seq_len), dtype]
        return [*names, str(self.device), str(data.batch_size)]


def _code(module: ModuleType) -> str:
    """Hash of the code of a module."""
    return code_digest(ast.parse(inspect.getsource(module)))
