"""Launch configurations: the rules of the table, and the cache that overrides them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.kernels.triton import tune
from harness.kernels.triton.tune import Config, Problem

CPU = torch.device("cpu")
PROBLEM = Problem("triton_w4a16", 5, 4096, 4096, 128, torch.bfloat16)
OTHER = Config(128, 16, 7)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "kernels.json"
    monkeypatch.setenv("PTQBENCH_KERNEL_CACHE", str(path))
    tune.read_cache.cache_clear()
    yield path
    tune.read_cache.cache_clear()


def choose(M: int, N: int = 4096, K: int = 4096) -> Config:
    return tune.choose("triton_w4a16", M, N, K, 128, torch.bfloat16, CPU)


def test_the_table_knows_three_regimes() -> None:
    assert [choose(M).path for M in (1, 32, 64, 512, 1024)] == ["split", "split", "tensor", "tensor", "dequantize"]


def test_rows_count_by_powers_of_two() -> None:
    assert [tune.bucket(M) for M in (0, 1, 2, 3, 17, 64)] == [1, 1, 2, 4, 32, 64]
    assert choose(33) == choose(64)


def test_k_is_split_until_the_grid_fills_the_gpu_twice() -> None:
    assert choose(1, N=64 * 132).split_k == 2
    assert choose(1, N=64 * 33, K=8192).split_k == 8
    assert choose(1, N=64 * 1000).split_k == 1
    assert choose(1, N=64, K=256).split_k == 1


def test_an_autotuned_configuration_overrides_the_table_for_its_bucket_alone(cache: Path) -> None:
    times = {Config(): 2.0, OTHER: 1.0}
    timed: list[Config] = []

    def clock(call: object) -> float:
        call()  # type: ignore[operator]
        return times[timed[-1]]

    assert tune.autotune(PROBLEM, times, timed.append, CPU, clock) == OTHER
    assert timed == list(times)
    assert choose(8) == OTHER
    assert choose(9) != OTHER
    assert [file.name for file in cache.parent.iterdir()] == ["kernels.json"]


def test_the_cache_is_read_once_and_grows(cache: Path) -> None:
    tune.write_cache({PROBLEM.key(CPU): OTHER})
    assert choose(8) == OTHER
    cache.unlink()
    assert choose(8) == OTHER
    tune.write_cache({**tune.read_cache(), "another": Config()})
    assert set(tune.read_cache()) == {PROBLEM.key(CPU), "another"}


def test_a_candidate_that_fails_is_passed_over() -> None:
    def run(config: Config) -> None:
        if config != OTHER:
            raise RuntimeError("out of shared memory")

    def clock(call: object) -> float:
        call()  # type: ignore[operator]
        return 1.0

    assert tune.autotune(PROBLEM, [Config(), OTHER], run, CPU, clock) == OTHER
    with pytest.raises(RuntimeError, match="no configuration of triton_w4a16 runs"):
        tune.autotune(PROBLEM, [Config()], run, CPU, clock)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": {"block": 1}}', '{"a": 1}'])
def test_a_damaged_cache_says_so(cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with pytest.raises(ValueError, match="is not a cache of kernel configurations .* delete it"):
        choose(1)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTQBENCH_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert tune.cache_file() == Path("/caches/ptqbench/kernels.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tune.cache_file() == Path.home() / ".cache/ptqbench/kernels.json"
