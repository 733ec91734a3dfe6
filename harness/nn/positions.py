"""The number of positions that a model has, from its config and from its tables of learned positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions")
_POSITIONS = re.compile(r"(^|_)pos(ition)?s?(_|$)|wpe$")
_MOST = 2**31  # a larger value means that there is no limit


def positions(shape: Any, model: nn.Module | None = None) -> int | None:
    """The positions of a model with the config `shape`; None if there is no limit, or none is known.

    A table of learned positions has fewer usable rows than the config says where its first rows are reserved: those up
    to the padding token (RoBERTa), or a fixed `offset` (OPT). `model` may be a skeleton without weights.
    """
    text = shape.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in _NAMES]
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < _MOST]
    return min([*known, *(_usable_rows(model, known) if model is not None else [])], default=None)


def _usable_rows(model: nn.Module, known: Sequence[int]) -> list[int]:
    """The usable rows of each table of learned positions, without tables of other lengths, as those of an image."""
    usable = []
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Embedding) and _POSITIONS.search(name.rsplit(".", 1)[-1])):
            continue
        offset, rows = int(getattr(module, "offset", 0)), module.num_embeddings
        if not known or rows in known or rows - offset in known:
            padding = 0 if offset or module.padding_idx is None else module.padding_idx + 1
            usable.append(rows - offset - padding)
    return usable
