"""The contenders of the kernel benchmark: plain matmuls, every kernel of the table, and peers that are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import (
    ActivationFormat,
    FloatActivation,
    FloatWeight,
    IntActivation,
    IntWeight,
    LevelsWeight,
    QTensor,
    WeightFormat,
    round_to_nearest,
)
from harness.core.formats import InputQuantizer
from harness.kernels.bench.peers import PEERS, Peer
from harness.kernels.table import choose

_TOKENS = IntActivation(bits=8, symmetric=True, grid="narrow")
_OUTLIERS = IntActivation(bits=8, symmetric=True, grid="narrow", threshold=6.0)
FLOATS = {  # weight-only formats of small floats
    "mxfp4": FloatWeight(element="e2m1", granularity="group", group_size=32, scale_dtype="e8m0"),
    "nvfp4": FloatWeight(element="e2m1", granularity="group", group_size=16, scale_dtype="e4m3", tensor_scale=True),
    "fp8": FloatWeight(element="e4m3"),
}
_FP8 = {  # weights and inputs
    "w8a8 fp8": (FLOATS["fp8"], FloatActivation(element="e4m3")),
    "w8a8 fp8 tensor": (
        FloatWeight(element="e4m3", granularity="tensor"),
        FloatActivation(element="e4m3", granularity="tensor"),
    ),
}
# Relative errors: a few roundings of 2^-9, 2^-12 or 2^-24, of inputs, scales, sums and outputs.
_BOUNDS = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 1e-5}
_TIES = 2e-3
_INT8_BOUND = 2e-2  # of inputs rounded to 8 bits, about 0.6 %


@dataclass(frozen=True)
class Entry:
    """A kernel with one weight.

    call     inputs (M, K) -> outputs (M, N)
    decoded  returns the weight (N, K) float64 that the stored bits represent
    nbytes   bytes of the stored weight
    rounds   quantizes inputs as the kernel does before the product; None if it multiplies them unchanged
    """

    call: Callable[[Tensor], Tensor]
    decoded: Callable[[], Tensor]
    nbytes: int
    rounds: Callable[[Tensor], Tensor] | None = None


Copies = Callable[[], Entry]


@dataclass(frozen=True)
class Contender:
    """A kernel's name, the bound of the relative error of its arithmetic, and how to build it.

    prepare  takes a float32 weight (N, K) and returns a function that builds copies of the kernel with this weight
    """

    name: str
    prepare: Callable[[Tensor], Copies]
    bound: float


def baseline(dtype: torch.dtype) -> str:
    """The plain matmul whose time is 1: bf16, or fp32 where inputs are float32."""
    return "fp32" if dtype == torch.float32 else "bf16"


def contenders(device: torch.device, group_size: int, dtype: torch.dtype) -> list[Contender]:
    """All contenders for a device type. A contender that is not available raises an error when it is built."""
    bound = _BOUNDS[dtype]
    int8 = IntWeight(bits=8, symmetric=True, grid="narrow")
    entrants = [Contender("bf16", _plain(torch.bfloat16), _BOUNDS[torch.bfloat16])]
    if device.type == "cpu":
        entrants.append(Contender("fp32", _plain(torch.float32), _BOUNDS[torch.float32]))
    formats = _integers(device, group_size) | {"int8": int8}
    entrants += [Contender(name, _ours(_nearest(fmt), None, dtype), bound) for name, fmt in formats.items()]
    entrants.append(Contender("16 levels (nf4, fp4)", _ours(_levels, None, dtype), bound))
    for name, inputs in (("w8a8", _TOKENS), ("llm_int8", _OUTLIERS)):  # a tie may be rounded to the other code
        entrants.append(Contender(name, _ours(_nearest(int8), inputs, dtype), max(bound, _TIES)))
    entrants += [Contender(name, _ours(_nearest(fmt), None, dtype), bound) for name, fmt in FLOATS.items()]
    if device.type == "cuda":
        entrants += [
            Contender(name, _ours(_nearest(fmt), inputs, dtype), max(bound, _TIES))
            for name, (fmt, inputs) in _FP8.items()
        ]
    entrants.append(Contender(f"int4 g{group_size} decoded", _reference(formats[f"int4 g{group_size}"]), bound))
    return entrants + [_contending(peer, group_size, dtype) for peer in PEERS if device.type in peer.devices]


def _integers(device: torch.device, group_size: int) -> dict[str, IntWeight]:
    """The integer grids in groups; those of a GPU have 4 bits."""
    widths = (4, 3, 2, 8) if device.type == "cpu" else (4,)
    group = partial(IntWeight, granularity="group", group_size=group_size)
    symmetric = {f"int4 g{group_size} sym": group(bits=4, symmetric=True)}
    return {f"int{bits} g{group_size}": group(bits=bits) for bits in widths} | symmetric


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Copies]:
    def prepare(weight: Tensor) -> Copies:
        def build() -> Entry:
            stored = weight.to(dtype, copy=True)
            return Entry(lambda x: F.linear(x.to(dtype), stored), stored.double, stored.nbytes)

        return build

    return prepare


def _nearest(fmt: WeightFormat) -> Callable[[Tensor], QTensor]:
    return lambda weight: round_to_nearest(weight, fmt)


def _levels(weight: Tensor) -> QTensor:
    """NF4 in groups of 64; the levels of a table do not matter for its time."""
    return round_to_nearest(weight, LevelsWeight(table="nf4", granularity="group", group_size=64))


def _ours(
    quantize: Callable[[Tensor], QTensor], inputs: ActivationFormat | None, dtype: torch.dtype
) -> Callable[[Tensor], Copies]:
    def prepare(weight: Tensor) -> Copies:
        quantized, rounds = quantize(weight), None if inputs is None else InputQuantizer(inputs)

        def build() -> Entry:
            kernel = choose(quantized, rounds, dtype, weight.device)
            if kernel is None or kernel.quantizes_inputs != (rounds is not None):
                raise ValueError(f"the table has no kernel for this weight in {dtype} on {weight.device.type}")
            nbytes = sum(buffer.nbytes for buffer in kernel.buffers())
            return Entry(lambda x: kernel(x, None), lambda: quantized.dequantize(torch.float64), nbytes, rounds)

        return build

    return prepare


def _reference(fmt: IntWeight) -> Callable[[Tensor], Copies]:
    """Decode the weight at every call: the cost of a weight without a kernel."""

    def prepare(weight: Tensor) -> Copies:
        quantized = round_to_nearest(weight, fmt)

        def build() -> Entry:
            clone = copy.deepcopy(quantized)
            return Entry(
                lambda x: clone.linear(x, None), lambda: clone.dequantize(torch.float64), clone.stored_bits // 8
            )

        return build

    return prepare


def _contending(peer: Peer, group_size: int, dtype: torch.dtype) -> Contender:
    def prepare(weight: Tensor) -> Copies:
        return lambda: Entry(*peer.build(weight, group_size, dtype))

    return Contender(peer.name, prepare, _INT8_BOUND if peer.rounds_inputs else 3 * _BOUNDS[dtype])
