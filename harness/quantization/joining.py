"""Joins packed linears that read the same inputs, as query, key and value do; see `harness.kernels.joint`."""

from __future__ import annotations

import torch

from harness.kernels.base import JoinableKernel
from harness.kernels.joint import join
from harness.models import Decoder, input_groups, logits, probe_tokens
from harness.nn import QuantLinear


@torch.no_grad()
def join_linears(decoder: Decoder) -> int:
    """Join the packed linears of each input group, which one forward on a few tokens shows.

    Returns: the number of linears that are computed together with others.
    """
    linears = {name: module for name, module in decoder.model.named_modules() if _can_be_joined(module)}
    if not decoder.probed or len(linears) < 2:
        return 0
    count = 0
    for names in input_groups(dict(linears), lambda: logits(decoder.model, probe_tokens(decoder.model))):
        group = [linears[name] for name in names]
        joined = join([linear.packed for linear in group], [linear.bias for linear in group])
        if joined is None:
            continue
        for linear, kernel in zip(group, joined, strict=True):
            linear.packed = kernel
        count += len(joined)
    return count


def _can_be_joined(module: object) -> bool:
    """Whether a module is a packed linear whose kernel can be joined and gets the module's inputs as they are."""
    if not isinstance(module, QuantLinear) or not isinstance(module.packed, JoinableKernel):
        return False
    return module.packed.quantizes_inputs or module.input_quantizer is None
