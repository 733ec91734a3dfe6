"""The contenders of the kernel benchmark: plain matmuls, every kernel of the table, and peers that are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core import ActivationFormat, WeightFormat, round_to_nearest
from harness.core.formats import InputQuantizer
from harness.kernels.bench.peers import PEERS, Peer
from harness.kernels.table import choose

BASELINE = "bf16"
_TOKENS = ActivationFormat(bits=8, symmetric=True, grid="narrow")
_OUTLIERS = ActivationFormat(bits=8, symmetric=True, grid="narrow", threshold=6.0)


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


def contenders(device: torch.device, group_size: int, dtype: torch.dtype) -> list[Contender]:
    """All contenders for a device type. A contender that is not available raises an error when it is built."""
    bound = 8e-3 if dtype == torch.bfloat16 else 2e-3  # a few roundings of 2^-9 or 2^-12: inputs, scales, outputs
    weights = {
        f"int4 g{group_size}": WeightFormat(bits=4, granularity="group", group_size=group_size),
        f"int4 g{group_size} sym": WeightFormat(bits=4, granularity="group", group_size=group_size, symmetric=True),
        "int8": WeightFormat(bits=8, symmetric=True, grid="narrow"),
    }
    entrants = [Contender(BASELINE, _plain(torch.bfloat16), 8e-3)]
    if device.type == "cpu":
        entrants.append(Contender("fp32", _plain(torch.float32), 1e-5))
    entrants += [Contender(name, _ours(fmt, None, dtype), bound) for name, fmt in weights.items()]
    for name, inputs in (("w8a8", _TOKENS), ("llm_int8", _OUTLIERS)):
        entrants.append(Contender(name, _ours(weights["int8"], inputs, dtype), bound))
    entrants.append(Contender(f"int4 g{group_size} decoded", _reference(weights[f"int4 g{group_size}"], dtype), bound))
    peers = [peer for peer in PEERS if device.type in peer.devices]
    return entrants + [Contender(peer.name, _peer(peer, group_size, dtype), 3 * bound) for peer in peers]


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Copies]:
    def prepare(weight: Tensor) -> Copies:
        def build() -> Entry:
            stored = weight.to(dtype, copy=True)
            return Entry(lambda x: F.linear(x.to(dtype), stored), stored.double, stored.nbytes)

        return build

    return prepare


def _ours(fmt: WeightFormat, inputs: ActivationFormat | None, dtype: torch.dtype) -> Callable[[Tensor], Copies]:
    def prepare(weight: Tensor) -> Copies:
        quantized, rounds = round_to_nearest(weight, fmt), None if inputs is None else InputQuantizer(inputs)

        def build() -> Entry:
            kernel = choose(quantized, rounds, dtype, weight.device)
            if kernel is None or kernel.quantizes_inputs != (rounds is not None):
                raise ValueError(f"the table has no kernel for this weight in {dtype} on {weight.device.type}")
            nbytes = sum(buffer.nbytes for buffer in kernel.buffers())
            return Entry(lambda x: kernel(x, None), lambda: quantized.dequantize(torch.float64), nbytes, rounds)

        return build

    return prepare


def _reference(fmt: WeightFormat, dtype: torch.dtype) -> Callable[[Tensor], Copies]:
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


def _peer(peer: Peer, group_size: int, dtype: torch.dtype) -> Callable[[Tensor], Copies]:
    def prepare(weight: Tensor) -> Copies:
        return lambda: Entry(*peer.build(weight, group_size, dtype))

    return prepare
