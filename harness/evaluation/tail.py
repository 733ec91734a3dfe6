"""What a model does after its last block: final norm, head, scaling, capping."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration.replay import SAME_LOGITS, Stream, logits, moved_by
from harness.nn.hooks import standing_in

_PROBE_TOKENS = 16


class Tail:
    """Logits (T, V) of states (T, D) that the last block gives.

    It is the model's own forward, in which every block hands out the given states instead of running.
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        """Proved on the first of `tokens` (B, T).

        Raises: ValueError if what comes after the blocks depends on more than their states.
        """
        probe = Stream(model, tokens[:1, :_PROBE_TOKENS])
        self.model, self.blocks = model, probe.blocks
        seen: list[Any] = []
        handle = probe.blocks[-1].register_forward_hook(lambda _module, _args, output: seen.append(output))
        expected = logits(model, tokens[:1, :_PROBE_TOKENS])[0]
        handle.remove()
        self._rest = tuple(seen[0][1:]) if isinstance(seen[0], tuple) else None
        found = self(probe.onward(probe.states[0])[0])
        moved, limit = moved_by(found, expected), SAME_LOGITS[expected.dtype]
        if not moved <= limit:
            raise ValueError(
                f"what {type(model).__name__} does after its blocks does not follow from their states alone: logits "
                f"differ by {moved:.2g} relative, expected at most {limit:g}; use analysis.sensitivity=off"
            )

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        given: Any = states[None] if self._rest is None else (states[None], *self._rest)
        tokens = torch.zeros(1, len(states), dtype=torch.int64)
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(standing_in(block, lambda *_args, **_options: given))
            return logits(self.model, tokens)[0]
