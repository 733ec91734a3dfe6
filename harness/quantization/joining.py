"""Joins packed linears that read the same inputs, as query, key and value do; see `harness.kernels.joint`."""

from __future__ import annotations

import torch

from harness.kernels.base import Kernel
from harness.kernels.joint import join
from harness.models import Decoder, input_groups, logits, probe_tokens
from harness.nn import QuantLinear


@torch.no_grad()
def join_linears(decoder: Decoder) -> int:
    """Join the packed linears of each input group, which one forward on a few tokens shows.

    Returns: the number of linears that are computed together with others.
    """
    linears = {name: module for name, module in decoder.model.named_modules() if _runs_kernel(module)}
    if not decoder.probed or not linears:
        return 0
    count = 0
    for names in input_groups(dict(linears), lambda: logits(decoder.model, probe_tokens(decoder.model))):
        group = [linears[name] for name in names]
        joined = join([linear.packed for linear in group], [linear.bias for linear in group])
        for linear, kernel in zip(group, joined or (), strict=bool(joined)):
            linear.packed = kernel
        count += len(joined or ())
    return count


def _runs_kernel(module: object) -> bool:
    """Whether a module is a packed linear that passes its inputs to its kernel as they are."""
    if not isinstance(module, QuantLinear) or not isinstance(module.packed, Kernel):
        return False
    return module.packed.quantizes_inputs or module.input_quantizer is None
