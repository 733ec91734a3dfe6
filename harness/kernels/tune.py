"""Which tile sizes a matmul kernel runs with: a table first, overridden by what `autotune` found on this GPU.

Results of autotuning are kept in a JSON file (environment variable PTQBENCH_KERNEL_CACHE, else
$XDG_CACHE_HOME/ptqbench/kernels.json, else ~/.cache/ptqbench/kernels.json) that is read once a process. Timing
happens in `autotune` alone, never in a forward pass.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

_DEFAULT_PROCESSORS = 132  # an H100's, where there is no GPU to ask
_BLOCK_K = 128
_DEQUANTIZE_FROM = 1024


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    block_n, block_m   rows of the weight and of the input that a program computes
    split_k            programs that share the sum over K
    num_warps, num_stages   as triton's
    path               "split" (memory-bound), "tensor" (tensor cores busy), "dequantize" (weights decoded first)
    """

    block_n: int = 64
    block_m: int = 16
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    path: str = "split"


@dataclass(frozen=True)
class Problem:
    """What a choice depends on: M is the input's rows, N and K the weight's shape, `group_size` K for whole rows."""

    kernel: str
    M: int
    N: int
    K: int
    group_size: int
    dtype: torch.dtype

    def key(self, device: torch.device) -> str:
        """Name of this problem in the cache; M counts by its power of two."""
        dtype = str(self.dtype).removeprefix("torch.")
        M = bucket(self.M)
        return (
            f"{_device_name(device)}|{_triton_version()}|{self.kernel}|{self.N}|{self.K}|{M}|{self.group_size}|{dtype}"
        )


def bucket(M: int) -> int:
    """The power of two at or above M."""
    return 1 << max(M - 1, 0).bit_length()


def choose(  # noqa: PLR0913 - the shape of a matmul, said in full
    kernel: str, M: int, N: int, K: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """The configuration for a matmul of (M, K) by a weight (N, K): from the cache, or else from the table."""
    found = read_cache().get(Problem(kernel, M, N, K, group_size, dtype).key(device))
    return found or heuristic(bucket(M), N, K, processors(device))


def heuristic(M: int, N: int, K: int, count: int) -> Config:
    """The table: M a power of two, `count` the GPU's processors."""
    if M >= _DEQUANTIZE_FROM:
        return Config(path="dequantize")
    if M <= 32:
        block_m = max(M, 16)
        return Config(64, block_m, _split(-(-N // 64), K, count), num_warps=4, num_stages=5, path="split")
    block_n, block_m, warps = (64, 64, 4) if M == 64 else (128, 128, 8)
    programs = -(-N // block_n) * -(-M // block_m)
    split_k = _split(programs, K, count) if programs < count else 1
    return Config(block_n, block_m, split_k, num_warps=warps, num_stages=4 if M == 64 else 3, path="tensor")


def _split(programs: int, K: int, count: int) -> int:
    """Parts of K, a power of two, so that about two programs run on each processor and each has 4 blocks of K."""
    split = 1
    while split < 32 and programs * split <= count and split * 8 * _BLOCK_K <= K:
        split *= 2
    return split


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`."""
    if device.type != "cuda":
        return _DEFAULT_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache
def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def cache_file() -> Path:
    """Where results of autotuning are kept."""
    if given := os.environ.get("PTQBENCH_KERNEL_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptqbench" / "kernels.json"


@lru_cache(maxsize=1)
def read_cache() -> dict[str, Config]:
    """All stored configurations; `read_cache.cache_clear()` reads them anew.

    Raises: ValueError if the file is not what `autotune` writes.
    """
    path = cache_file()
    if not path.exists():
        return {}
    try:
        return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no cache of kernel configurations ({error}); delete it, and autotune anew"
        ) from error


def write_cache(configs: dict[str, Config]) -> None:
    """Replace the cache at once, so that no reader ever sees half a file."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump({key: asdict(config) for key, config in sorted(configs.items())}, file, indent=1)
    Path(file.name).replace(path)
    read_cache.cache_clear()


def autotune(
    problem: Problem,
    candidates: Iterable[Config],
    run: Callable[[Config], None],
    device: torch.device,
    clock: Callable[[Callable[[], None]], float] | None = None,
) -> Config:
    """Time `run` with each candidate, store the quickest for `problem` and return it.

    `clock` returns the time of a call; None is the median of replays of a CUDA graph. `run` must be fit to be
    captured. What does not compile or does not fit the GPU is passed over.
    Raises: RuntimeError if no candidate runs.
    """
    times, failure = {}, None
    for config in candidates:
        try:
            times[config] = (clock or _graph_time)(lambda config=config: run(config))  # type: ignore[misc]
        except Exception as error:  # triton raises many kinds where a kernel is too large
            failure = error
    if not times:
        raise RuntimeError(f"no configuration of {problem.kernel} runs at {problem}; the last failed") from failure
    best = min(times, key=times.__getitem__)
    write_cache({**read_cache(), problem.key(device): best})
    return best


def _graph_time(call: Callable[[], None]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, return_mode="median"))
