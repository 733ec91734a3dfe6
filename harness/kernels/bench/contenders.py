"""What the kernel benchmark races: plain matmuls, every kernel of the table, and peers that load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.core.activation import InputQuantizer
from harness.core.qtensor import round_to_nearest
from harness.core.scheme import ActivationFormat, WeightFormat
from harness.kernels.bench.peers import PEERS, Peer
from harness.kernels.table import choose

BASELINE = "bf16"
_TOKENS = ActivationFormat(bits=8, symmetric=True, grid="narrow")
_OUTLIERS = ActivationFormat(bits=8, symmetric=True, grid="narrow", threshold=6.0)


@dataclass(frozen=True)
class Entry:
    """A kernel with one weight.

    call     inputs (M, K) -> outputs (M, N)
    decoded  the weight (N, K) float64 that its stored bits stand for
    nbytes   that its weight takes
    rounds   what becomes of the inputs before the product; None where they are taken as they are
    """

    call: Callable[[Tensor], Tensor]
    decoded: Callable[[], Tensor]
    nbytes: int
    rounds: Callable[[Tensor], Tensor] | None = None


Copies = Callable[[], Entry]


@dataclass(frozen=True)
class Contender:
    """A kernel's name, the relative error that its arithmetic may have, and how to make it.

    prepare  takes a float32 weight (N, K) and returns what makes copies of the kernel with it
    """

    name: str
    prepare: Callable[[Tensor], Copies]
    bound: float


def contenders(device: torch.device, group_size: int, dtype: torch.dtype) -> list[Contender]:
    """All that there are for a device type; one that cannot be built raises once it is."""
    bound = 8e-3 if dtype == torch.bfloat16 else 2e-3  # a few roundings of 2^-9 or 2^-12: inputs, scales, outputs
    weights = {
        f"int4 g{group_size}": WeightFormat(bits=4, granularity="group", group_size=group_size),
        f"int4 g{group_size} sym": WeightFormat(bits=4, granularity="group", group_size=group_size, symmetric=True),
        "int8": WeightFormat(bits=8, symmetric=True, grid="narrow"),
    }
    found = [Contender(BASELINE, _plain(torch.bfloat16), 8e-3)]
    if device.type == "cpu":
        found.append(Contender("fp32", _plain(torch.float32), 1e-5))
    found += [Contender(name, _ours(fmt, None, dtype), bound) for name, fmt in weights.items()]
    for name, inputs in (("w8a8", _TOKENS), ("llm_int8", _OUTLIERS)):
        found.append(Contender(name, _ours(weights["int8"], inputs, dtype), bound))
    found.append(Contender(f"int4 g{group_size} decoded", _reference(weights[f"int4 g{group_size}"], dtype), bound))
    raced = [peer for peer in PEERS if device.type in peer.devices]
    return found + [Contender(peer.name, _peer(peer, group_size, dtype), 3 * bound) for peer in raced]


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
                raise ValueError(f"the table has no kernel for it in {dtype} on {weight.device.type}")
            nbytes = sum(buffer.nbytes for buffer in kernel.buffers())
            return Entry(lambda x: kernel(x, None), lambda: quantized.dequantize(torch.float64), nbytes, rounds)

        return build

    return prepare


def _reference(fmt: WeightFormat, dtype: torch.dtype) -> Callable[[Tensor], Copies]:
    """Decoding at every call: what a weight without a kernel costs."""

    def prepare(weight: Tensor) -> Copies:
        quantized = round_to_nearest(weight, fmt)

        def build() -> Entry:
            mine = copy.deepcopy(quantized)
            return Entry(lambda x: mine.linear(x, None), lambda: mine.dequantize(torch.float64), mine.stored_bits // 8)

        return build

    return prepare


def _peer(peer: Peer, group_size: int, dtype: torch.dtype) -> Callable[[Tensor], Copies]:
    def prepare(weight: Tensor) -> Copies:
        return lambda: Entry(*peer.build(weight, group_size, dtype))

    return prepare
