"""What all peers share: the interface, and the checks of shapes, groups, dtypes and devices."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.core import IntQTensor, IntWeight, round_to_nearest
from harness.core.formats.scales import ScaleDtype

Built = tuple[Callable[[Tensor], Tensor], Callable[[], Tensor], int]

HALVES = (torch.float16, torch.bfloat16)
_CHUNK = 1024  # unit vectors per call of a matmul
_SCALE_NAMES: dict[torch.dtype, ScaleDtype] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}


@dataclass(frozen=True)
class Peer:
    """One library's matmul.

    name           its name in the table
    devices        device types on which it is timed
    build          takes a weight (N, K) float32 on the device of the matmul, a group size, and the dtype of x and y;
                   returns call(x (M, K)) -> y (M, N); decoded() -> the weight (N, K) float64 that the stored bits
                   represent; and the bytes of weight and scales that one call reads.
                   Raises: ImportError if the library is missing; ValueError if it does not support the weight or dtype.
    rounds_inputs  the matmul rounds its inputs to 8 bits, so its result has a larger error
    """

    name: str
    devices: tuple[str, ...]
    build: Callable[[Tensor, int, torch.dtype], Built]
    rounds_inputs: bool = False


def rounded(weight: Tensor, group_size: int, dtype: torch.dtype) -> IntQTensor:
    """A weight (N, K) rounded to an asymmetric 4-bit grid per group, with scales in `dtype`."""
    fmt = IntWeight(bits=4, granularity="group", group_size=group_size, scale_dtype=_SCALE_NAMES[dtype])
    return round_to_nearest(weight, fmt)


def weight_from_unit_vectors(
    call: Callable[[Tensor], Tensor], columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weight (N, K) float64 that a matmul returns for unit vectors: each value as the kernel rounds it to `dtype`.

    This is the weight that the kernel multiplies by. If it is packed in the wrong order, only a comparison with the
    original weight shows the error.
    """
    columns_of_weight = []
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        units = torch.zeros(stop - start, columns, dtype=dtype, device=device)
        units[:, start:stop].fill_diagonal_(1)
        columns_of_weight.append(call(units).double())
    return torch.cat(columns_of_weight).t()


def require(module: str, package: str) -> None:
    """Raise ModuleNotFoundError that names the package if `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{package} is not installed (no module {module}); install {package}", name=module)


def check_device(name: str, weight: Tensor, expected: tuple[str, ...]) -> None:
    """Raise ValueError for a weight on another device type."""
    if weight.device.type not in expected:
        raise ValueError(f"{name} does not run on {weight.device.type}; expected {' or '.join(expected)}")


def check_dtype(name: str, dtype: torch.dtype, expected: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError for another dtype of the inputs."""
    if dtype not in expected:
        raise ValueError(f"{name} does not support {dtype}; expected {' or '.join(map(str, expected))}")


def check_group(name: str, weight: Tensor, group_size: int, expected: tuple[int, ...] = ()) -> None:
    """Raise ValueError for a group size that is not `expected`, if given, or does not divide K."""
    if expected and group_size not in expected:
        raise ValueError(f"{name} does not support group_size={group_size}; expected one of {expected}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"{name} does not support group_size={group_size}; expected a divisor of K={weight.shape[1]}")


def check_multiple(name: str, weight: Tensor, rows: int, columns: int) -> None:
    """Raise ValueError unless N is a multiple of `rows` and K of `columns`."""
    if weight.shape[0] % rows or weight.shape[1] % columns:
        raise ValueError(
            f"{name} does not support a weight of (N, K)={tuple(weight.shape)}; expected multiples of {(rows, columns)}"
        )


def paired(values: Tensor) -> Tensor:
    """Values from 0 to 15 as a flat tensor of bytes; the first of two is in the lower half of a byte."""
    first, second = values.flatten().to(torch.uint8).view(-1, 2).unbind(1)
    return first | second << 4
