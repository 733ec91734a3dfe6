"""Time calls with cold caches: successive calls use different copies of a weight, which together exceed the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
_GPU_BYTES = 256 << 20  # of all copies of a weight together: over four times the L2 of an H100 or H200
_CPU_BYTES = 160 << 20
_MOST_COPIES = 256


@dataclass(frozen=True)
class Times:
    """Microseconds per call: the median, and the 10th and 90th percentile of the samples."""

    us_p50: float
    us_p10: float
    us_p90: float


def copies(nbytes: int, device: torch.device) -> int:
    """Number of copies of a weight of `nbytes` that together exceed every cache of the device."""
    return max(2, min(_MOST_COPIES, -(-(_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // nbytes)))


def measure(calls: Sequence[Call], device: torch.device, seconds: float) -> Times:
    """Time `calls`, which do the same work on different copies of a weight, for about `seconds` in total."""
    return _on_gpu(calls, seconds) if device.type == "cuda" else _on_cpu(calls, seconds)


def _on_cpu(calls: Sequence[Call], seconds: float) -> Times:
    for call in calls[:2]:
        call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        calls[len(samples) % len(calls)]()
        samples.append(1e6 * (time.perf_counter() - start))
    return _summary(samples)


def _on_gpu(calls: Sequence[Call], seconds: float) -> Times:
    """A sample is the time of one replay of a CUDA graph of all calls, divided by the number of calls."""
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
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 10 or time.perf_counter() < end:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        samples.append(1e3 * start.elapsed_time(stop) / len(calls))
    return _summary(samples)


def _summary(samples: list[float]) -> Times:
    tenths = statistics.quantiles(samples, n=10)
    return Times(statistics.median(samples), tenths[0], tenths[-1])


@dataclass(frozen=True)
class Roofline:
    """Rates measured in this run: bytes per second read and written by a copy, and bf16 operations per second."""

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
    copied = measure([lambda: target.copy_(source)] * 2, device, 0.5)
    size = 8192 if gpu else 2048
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplied = measure([lambda: left @ right] * 2, device, 0.5)
    return Roofline(2e6 * source.nbytes / copied.us_p50, 2e6 * size**3 / multiplied.us_p50)
