"""Training of the scales, and float zero points, of codes whose values are proportional to their scale."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.core.formats.qtensor import GroupedQTensor, Tuner

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def scale_tuner(qtensor: GroupedQTensor) -> Tuner | None:
    """A tuner of `scale`, and of `zero_point` if it is a float; None if scales are no floats of 16 bits or more.

    The codes are decoded anew for each weight, so that it takes no memory between two calls.
    """
    stored = {name: getattr(qtensor, name) for name in ("scale", "zero_point") if _trainable(qtensor, name)}
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
        for name, value in values.items():
            dtype = stored[name].dtype
            smallest = torch.finfo(dtype).tiny if name == "scale" else -torch.finfo(dtype).max
            qtensor.register_buffer(name, value.clamp(smallest, torch.finfo(dtype).max).to(dtype))

    return Tuner({name: value.float() for name, value in stored.items()}, weight, accept)


def _trainable(qtensor: GroupedQTensor, name: str) -> bool:
    stored = getattr(qtensor, name, None)
    return isinstance(stored, Tensor) and stored.dtype in _FLOATS
