"""The precision of products during training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def products(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    """Compute products on `device` in bfloat16, or as they are; what is trained keeps its dtype."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()
