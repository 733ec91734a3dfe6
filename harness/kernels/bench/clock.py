"""Time calls of several contenders in turns, with cold caches.

Contenders alternate, so that a slow phase of the machine is in the times of all; speedups are medians of the ratios of
neighbouring turns. Successive calls use different copies of a weight, so that none is in the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

import torch

Call = Callable[[], object]
Turn = list[float]  # microseconds of each call
_GPU_BYTES = 256 << 20  # of all copies of a weight together: over four times the L2 of an H100 or H200
_CPU_BYTES = 160 << 20
_MOST_COPIES = 256
_TURN = 3  # calls that are timed in a turn
_LONG_US = 5000.0  # a call of this length is a turn
_LEAST_TURNS = 5


@dataclass(frozen=True)
class Times:
    """Microseconds per call: the median, and the 10th and 90th percentile of the samples."""

    us_p50: float
    us_p10: float
    us_p90: float


def copies(nbytes: int, device: torch.device, together: int) -> int:
    """Number of copies of a weight of `nbytes`, so that a call does not find its weight in any cache of the device.

    On a GPU, the copies of one contender exceed the cache. On a CPU it is enough that a turn uses different ones, and
    that the calls of all contenders, which read `together` bytes with one copy each, exceed the cache before a copy is
    used again.
    """
    if device.type == "cuda":
        return max(2, min(_MOST_COPIES, -(-_GPU_BYTES // nbytes)))
    return max(2, min(_MOST_COPIES, -(-_CPU_BYTES // nbytes), max(1 + _TURN, -(-_CPU_BYTES // together))))


def alternate(turns: Sequence[Callable[[], Turn]], seconds: float) -> list[list[Turn]]:
    """Let all contenders take turns, for about `seconds` each. Returns: the turns of each."""
    taken: list[list[Turn]] = [[] for _ in turns]
    end = time.perf_counter() + seconds * len(turns)
    while len(taken[0]) < _LEAST_TURNS or time.perf_counter() < end:
        for turn, own in zip(turns, taken, strict=True):
            own.append(turn())
    return taken


def times(turns: Sequence[Turn]) -> Times:
    """The times of a contender."""
    tenths = statistics.quantiles(samples := list(chain(*turns)), n=10)
    return Times(statistics.median(samples), tenths[0], tenths[-1])


def speedup(baseline: Sequence[Turn], turns: Sequence[Turn]) -> float:
    """How many times as fast as the baseline: the median over rounds."""
    pairs = zip(baseline, turns, strict=True)
    return statistics.median(statistics.median(slow) / statistics.median(fast) for slow, fast in pairs)


def turns_of(calls: Sequence[Call], device: torch.device) -> Callable[[], Turn]:
    """A function that takes a turn of `calls`, which do the same work on different copies of a weight."""
    return _on_gpu(calls) if device.type == "cuda" else _on_cpu(calls)


def _on_cpu(calls: Sequence[Call]) -> Callable[[], Turn]:
    """The first call of a turn wakes the threads of a library and is not counted, unless it is long."""
    following = cycle(calls)

    def sample() -> float:
        call = next(following)
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    def turn() -> Turn:
        first = sample()
        return [first] if first > _LONG_US else [sample() for _ in range(_TURN)]

    for _ in calls[:2]:
        sample()
    return turn


def _on_gpu(calls: Sequence[Call]) -> Callable[[], Turn]:
    """A turn is one replay of a CUDA graph of all calls; its time is divided by the number of calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up first: compilation and allocation must not be captured
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()

    def turn() -> Turn:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return [1e3 * start.elapsed_time(stop) / len(calls)]

    return turn


@dataclass(frozen=True)
class Roofline:
    """Measured rates: bytes per second read and written by a copy, and bf16 operations per second."""

    bandwidth: float
    rate: float

    def floor_us(self, nbytes: float, operations: float) -> float:
        """The least microseconds in which the device can move these bytes and do these operations."""
        return 1e6 * max(nbytes / self.bandwidth, operations / self.rate)


def roofline(device: torch.device) -> Roofline:
    """Measure both rates: with a copy of a large tensor, and with a large bf16 matmul."""
    gpu = device.type == "cuda"
    source = torch.ones((1 << 30 if gpu else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    size = 8192 if gpu else 2048
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls: list[Call] = [lambda: target.copy_(source), lambda: left @ right]
    copied, multiplied = (times(turns) for turns in alternate([turns_of([call] * 2, device) for call in calls], 0.5))
    return Roofline(2e6 * source.nbytes / copied.us_p50, 2e6 * size**3 / multiplied.us_p50)


def best(rooflines: Sequence[Roofline]) -> Roofline:
    """The highest rates of several measurements."""
    return Roofline(max(each.bandwidth for each in rooflines), max(each.rate for each in rooflines))
