"""The largest inputs of linears for each channel, over the calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.calibration import survey
from harness.core import MinMax
from harness.models import Decoder
from harness.utils.disk_cache import DiskCache
from harness.utils.progress import Track, silent


@torch.no_grad()
def absmax(
    decoder: Decoder, names: Sequence[str], tokens: Tensor, cache: DiskCache, track: Track = silent
) -> dict[str, list[float]]:
    """Largest magnitude of each input channel (K,) of the linears `names` over `tokens` (B, T), to four digits.

    Linears that read the same input have one entry, under the name of the first of them.
    """
    return {
        next(iter(group.linears)): [float(f"{value:.4g}") for value in stats[MinMax].absmax.tolist()]
        for groups, group_stats in survey(decoder, tokens, names, [MinMax], cache, track)
        for group, stats in zip(groups, group_stats, strict=True)
    }
