"""Launch configurations of the matmul kernels: a table, overridden by the results of `autotune` on this GPU.

Results of autotuning are stored in a JSON file (environment variable PTQBENCH_KERNEL_CACHE, else
$XDG_CACHE_HOME/ptqbench/kernels.json, else ~/.cache/ptqbench/kernels.json), which each process reads once. Only
`autotune` measures times; a forward pass never does.
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

_DEFAULT_PROCESSORS = 132  # multiprocessors of an H100, used if there is no GPU
_BLOCK_K = 128
_DEQUANTIZE_FROM = 1024


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    block_n, block_m   rows of the weight and of the input in the tile of one program
    split_k            number of programs that share the sum over K
    num_warps, num_stages   triton's launch options
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
    """A matmul to choose a configuration for: input (M, K), weight (N, K); `group_size` is K for whole rows."""

    kernel: str
    M: int
    N: int
    K: int
    group_size: int
    dtype: torch.dtype

    def key(self, device: torch.device) -> str:
        """Key of this problem in the cache; M is rounded up to a power of two."""
        dtype = str(self.dtype).removeprefix("torch.")
        M = bucket(self.M)
        return (
            f"{_device_name(device)}|{_triton_version()}|{self.kernel}|{self.N}|{self.K}|{M}|{self.group_size}|{dtype}"
        )


def bucket(M: int) -> int:
    """M rounded up to a power of two."""
    return 1 << max(M - 1, 0).bit_length()


def choose(  # noqa: PLR0913 - all dimensions of a matmul
    kernel: str, M: int, N: int, K: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """The configuration for a matmul of inputs (M, K) with a weight (N, K): from the cache, else from the table."""
    cached = read_cache().get(Problem(kernel, M, N, K, group_size, dtype).key(device))
    return cached or heuristic(bucket(M), N, K, processors(device))


def heuristic(M: int, N: int, K: int, count: int) -> Config:
    """The table: M is a power of two, `count` the number of the GPU's multiprocessors."""
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
    """Number of parts of K, a power of two: about two programs per multiprocessor, each with at least 4 blocks of K."""
    split = 1
    while split < 32 and programs * split <= count and split * 8 * _BLOCK_K <= K:
        split *= 2
    return split


@lru_cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors of `device`."""
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
    """The file that stores the results of autotuning."""
    if path := os.environ.get("PTQBENCH_KERNEL_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptqbench" / "kernels.json"


@lru_cache(maxsize=1)
def read_cache() -> dict[str, Config]:
    """All stored configurations. After `read_cache.cache_clear()` the file is read again.

    Raises: ValueError if the file does not have the format that `autotune` writes.
    """
    path = cache_file()
    if not path.exists():
        return {}
    try:
        return {key: Config(**fields) for key, fields in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a cache of kernel configurations ({error}); delete it and run autotune again"
        ) from error


def write_cache(configs: dict[str, Config]) -> None:
    """Replace the cache file atomically, so that no reader sees an incomplete file."""
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
    """Time `run` with each candidate, store the fastest one for `problem` and return it.

    `clock` returns the time of a call; None means the median over replays of a CUDA graph, which requires that `run`
    can be captured. Candidates that do not compile or do not fit the GPU are skipped.
    Raises: RuntimeError if no candidate runs.
    """
    times, failure = {}, None
    for config in candidates:
        try:
            times[config] = (clock or _graph_time)(lambda config=config: run(config))  # type: ignore[misc]
        except Exception as error:  # triton raises many types if a kernel is too large
            failure = error
    if not times:
        raise RuntimeError(f"no configuration of {problem.kernel} runs for {problem}; see the last error") from failure
    best = min(times, key=times.__getitem__)
    write_cache({**read_cache(), problem.key(device): best})
    return best


def _graph_time(call: Callable[[], None]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, return_mode="median"))
