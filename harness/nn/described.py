"""A tensor with shape, dtype and device, but without values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Described(Tensor):
    """The description of a weight (N, K) that is not stored as one float tensor.

    Models ask a linear's weight for its dtype or device to cast inputs. Every operation on values raises a ValueError.
    """

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Described:
        described: Described = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return described

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Takes the arguments of `__new__`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ValueError(f"{func} reads the float weight of a quantized linear; add the linear to skip")
