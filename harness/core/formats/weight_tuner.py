"""Training of a weight under rounding: it is rounded anew in each step, with the scales and levels under training.

For a value w that is rounded to w', with the scale s of its group, and m = 0 where w lies beyond the outermost values
of the format, else 1, gradients pass rounding unchanged (straight-through):

    dw'/dw = m        dw'/ds = (w' - m w) / s        dw'/dz = s (m - 1) for a float zero point z

and dw'/dl = s, or 1 without groups, for the level l of a row's table to which w is rounded. Sources: Bengio et al.
2013, arXiv 1308.3432, section 4 (straight-through); Esser et al. 2020, arXiv 1902.08153, equation 3 (the scale).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.core.formats.format import WeightFormat
from harness.core.formats.params import Params
from harness.core.formats.qtensor import GroupedQTensor, PermutedQTensor, QTensor, Tuner
from harness.core.formats.scale_tuner import trainable, within_range

_HALVINGS = 6
_SAME = 1e-5  # relative difference of a value that two functions decode; steps are larger
_BEYOND = 2.0**60  # more than any weight


def weight_tuner(qtensor: QTensor, weight: Tensor) -> Tuner | None:
    """A tuner of a weight (N, K) that `qtensor` rounds, and of what `tuner` moves; None if no rounding finds its codes.

    The weight starts between the stored values and `weight`, as near to `weight` as the stored codes allow.
    """
    if isinstance(qtensor, PermutedQTensor):
        order, tuner = qtensor.order.long(), weight_tuner(qtensor.base, weight[:, qtensor.order.long()])
        inverse = order.argsort()
        return tuner and replace(tuner, weight=lambda values: tuner.weight(values)[:, inverse])
    if not isinstance(qtensor, GroupedQTensor):
        return None
    fmt, stored = qtensor.fmt, qtensor.params()
    floats = trainable(qtensor, "scale", "zero_point", *(() if stored.levels is None else ("levels",)))

    def params(values: dict[str, Tensor]) -> Params:
        tiny = torch.finfo(stored.scale.dtype).tiny
        return replace(
            stored,
            scale=values["scale"].clamp(min=tiny) if "scale" in values else stored.scale,
            zero_point=values.get("zero_point", stored.zero_point),
            levels=values["levels"].sort(1).values if "levels" in values else None,
        )

    def rounded(values: dict[str, Tensor]) -> Tensor:
        each = params(values)
        tensors = values["weight"], each.scale, each.zero_point, each.levels
        decoded: Tensor = _Rounded.apply(*tensors, fmt, stored)  # type: ignore[no-untyped-call]
        return decoded

    def accept(values: dict[str, Tensor]) -> None:
        kept = params(within_range({name: values[name] for name in floats}, floats))
        for name, buffer in fmt.quantized(values["weight"], kept).named_buffers():
            qtensor.register_buffer(name, buffer)

    start = _between(weight.float(), qtensor, stored)
    return Tuner({"weight": start} | {name: value.float() for name, value in floats.items()}, rounded, accept)


def _between(weight: Tensor, qtensor: GroupedQTensor, params: Params) -> Tensor:
    """Values that are rounded to those of `qtensor`, on the way from these to `weight`."""
    fmt, decoded, spread = qtensor.fmt, qtensor.dequantize(), params.spread()
    start, left = decoded.clone(), torch.ones_like(decoded, dtype=torch.bool)
    for halving in range(_HALVINGS):
        tried = decoded + (weight - decoded) * 0.5**halving
        rounded = fmt.from_groups(fmt.snap(fmt.to_groups(tried), spread), qtensor.shape)
        kept = left & torch.isclose(rounded, decoded, rtol=_SAME, atol=0)
        start[kept] = tried[kept]
        left &= ~kept
    return start


class _Rounded(torch.autograd.Function):
    """A weight rounded to the nearest values of a format."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, *others: Any) -> Tensor:
        """Rounded `weight` (N, K). `others`: zero point, levels, the format and its parameters."""
        zero_point, levels, fmt, stored = others
        params = replace(stored, scale=scale, zero_point=zero_point, levels=levels)
        groups = fmt.to_groups(weight)
        ctx.save_for_backward(groups)
        ctx.fmt, ctx.params, ctx.shape = fmt, params, weight.shape
        rounded = torch.empty_like(groups)
        for part, each in params.slabs(groups):
            fmt.snap(groups[part], each, out=rounded[part])
        decoded: Tensor = fmt.from_groups(rounded, (weight.shape[0], weight.shape[1]))
        return decoded

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (groups,), fmt, params = ctx.saved_tensors, ctx.fmt, ctx.params
        slope, by_weight = fmt.to_groups(slopes[0]), torch.empty_like(groups)
        needed = ctx.needs_input_grad[1:4]
        by_others: list[list[Tensor]] = [[], [], []]
        for part, each in params.slabs(groups):
            found = _slopes(groups[part], slope[part], each, fmt, needed)
            by_weight[part] = found[0]
            for parts, tensor in zip(by_others, found[1:], strict=True):
                parts += [] if tensor is None else [tensor]
        joined = (torch.cat(parts) if parts else None for parts in by_others)
        return fmt.from_groups(by_weight, ctx.shape), *joined, None, None


def _slopes(
    groups: Tensor, slope: Tensor, params: Params, fmt: WeightFormat, needed: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of some groups (R, G, n), and those of scales, zero points and levels as they are `needed`."""
    scale, zero_point, levels = params.scale, params.zero_point, params.levels
    lowest, highest = (fmt.snap(torch.full_like(groups[..., :1], end), params) for end in (-_BEYOND, _BEYOND))
    inside = (groups >= lowest) & (groups <= highest)
    by_scale = by_zero = by_level = None
    if needed[0]:
        by_scale = ((fmt.snap(groups, params) - groups * inside) * slope).sum(-1) / scale[..., 0]
    if needed[1]:
        by_zero = -(slope * ~inside).sum(-1) * scale[..., 0]
    if levels is not None and needed[2]:
        codes = fmt.encode(groups, params).flatten(1).long()
        steps = slope if zero_point is None else slope * scale
        by_level = torch.zeros_like(levels).scatter_add_(1, codes, steps.flatten(1))
    return slope * inside, by_scale, by_zero, by_level
