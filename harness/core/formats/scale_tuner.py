"""Training of the scales, and float zero points, of codes whose values are proportional to their scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness.core.formats.qtensor import GroupedQTensor, Tuner

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def scale_tuner(qtensor: GroupedQTensor) -> Tuner | None:
    """A tuner of `scale`, and of `zero_point` if it is a float; None if scales are no floats of 16 bits or more.

    The codes are decoded anew for each weight, so that it takes no memory between two calls.
    """
    stored = trainable(qtensor, "scale", "zero_point")
    if "scale" not in stored:
        return None
    fmt, shape = qtensor.fmt, qtensor.shape

    def weight(values: dict[str, Tensor]) -> Tensor:
        codes = fmt.to_groups(qtensor.codes)
        if "zero_point" in values:
            steps = codes.float() - values["zero_point"][..., None]
        else:
            params = qtensor.params()
            steps = fmt.decode(codes, replace(params, scale=torch.ones_like(params.scale)).spread())
        return fmt.from_groups(steps * values["scale"][..., None], shape)

    def accept(values: dict[str, Tensor]) -> None:
        for name, value in within_range(values, stored).items():
            qtensor.register_buffer(name, value.to(stored[name].dtype))

    return Tuner({name: value.float() for name, value in stored.items()}, weight, accept)


def trainable(qtensor: GroupedQTensor, *names: str) -> dict[str, Tensor]:
    """Those of the stored tensors `names` that are floats of 16 bits or more."""
    found = {name: getattr(qtensor, name, None) for name in names}
    return {name: each for name, each in found.items() if isinstance(each, Tensor) and each.dtype in _FLOATS}


def within_range(values: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values as they can be stored in the dtypes of `stored`, in float32; a scale stays positive."""
    limits = {name: torch.finfo(stored[name].dtype) for name in values}
    return {
        name: value.clamp(limits[name].tiny if name == "scale" else -limits[name].max, limits[name].max)
        .to(stored[name].dtype)
        .float()
        for name, value in values.items()
    }
