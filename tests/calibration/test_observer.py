"""Cached statistics: bounded in size, complete or absent, and always equal to those that the run would compute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.calibration import Stream, observer
from harness.calibration.observer import stat_identity
from harness.config import RunConfig, build_run
from harness.core import AbsMean, Hessian, MinMax, Sample, Stat
from harness.utils.digests import digest, module_digest, tensor_digest
from harness.utils.disk_cache import DiskCache
from tests.conftest import ROOT, TINY, resolve
from tests.support.blocks import TOKENS, codes_of
from tests.support.decoders import quantize
from tests.support.families import build, uneven

pytestmark = pytest.mark.usefixtures("torch_kernels")

ENTRY = 4 * 100  # bytes of tensors in one entry


def entry(value: float) -> dict[str, Tensor]:
    return {"0.total": torch.full((100,), value)}


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def aged(cache: DiskCache, key: str, seconds: int) -> None:
    """Set the last use of an entry back by `seconds`."""
    path = cache.folder / f"{key}.safetensors"
    os.utime(path, (path.stat().st_atime - seconds, path.stat().st_mtime - seconds))


def test_an_entry_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "new", 10_000)
    tensors = {
        "0.total": torch.randn(3, 5).double().T,  # not contiguous
        "0.tokens": torch.tensor(7),
        "1.inputs": torch.randn(2, 4).bfloat16(),
    }
    assert not cache.has("key")
    assert cache.load("key") is None
    cache.save("key", tensors)
    loaded = cache.load("key")
    assert cache.has("key")
    assert loaded is not None
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("cls", [MinMax, AbsMean, Hessian, Sample])
def test_a_restored_statistic_continues(cls: type[Stat]) -> None:
    whole, first, second = cls(6), cls(6), cls(6)
    parts = torch.randn(2, 40, 6)
    for part in parts:
        whole.update(part, part)
    first.update(parts[0], parts[0])
    second.restore(first.state(), torch.device("cpu"))
    second.update(parts[1], parts[1])
    assert first.state()
    for name, value in whole.state().items():
        assert torch.equal(second.state()[name], value)


def test_the_least_recently_used_goes_first_and_the_bound_holds(tmp_path: Path) -> None:
    unbounded = DiskCache(tmp_path, 10_000)
    unbounded.save("probe", entry(0))
    entry_size = size_on_disk(tmp_path)
    (tmp_path / "probe.safetensors").unlink()
    cache = DiskCache(tmp_path, 3 * entry_size)
    for i, key in enumerate("abc"):
        cache.save(key, entry(i))
        aged(cache, key, 1000 - 100 * i)
    assert cache.load("a") is not None  # used now
    cache.save("d", entry(3))
    assert [key for key in "abcd" if cache.has(key)] == ["a", "c", "d"]
    for i in range(5):
        cache.save(f"more{i}", entry(i))
        assert size_on_disk(tmp_path) <= 3 * entry_size
    assert not list(tmp_path.glob("*.part"))


def test_an_entry_larger_than_the_bound_is_not_stored_and_evicts_no_other(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 2 * ENTRY)
    cache.save("small", entry(1))
    cache.save("large", {"x": torch.zeros(201)})
    assert cache.has("small")
    assert not cache.has("large")


def test_a_bound_of_zero_stores_and_loads_nothing(tmp_path: Path) -> None:
    DiskCache(tmp_path, 10_000).save("key", entry(1))
    disabled = DiskCache(tmp_path, 0)
    disabled.save("other", entry(1))
    disabled.save("without any tensor", {})
    assert not disabled.has("key")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["key.safetensors"]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-7], lambda _: b"", lambda _: b"no tensors at all" * 9])
def test_a_damaged_entry_is_a_miss_and_removed(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache = DiskCache(tmp_path, 10_000)
    cache.save("key", entry(1))
    path = tmp_path / "key.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load("key") is None
    assert not path.exists()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file" / "folder", 10_000)
    cache.save("key", entry(1))
    assert not cache.has("key")
    assert cache.load("key") is None


WRITER = """
import sys, torch
from pathlib import Path
from harness.utils.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 2_000_000)
print("ready", flush=True)
sys.stdin.read()
for _ in range(30):
    cache.save("key", {"x": torch.full((50_000,), float(sys.argv[2]))})
    entry = cache.load("key")
    assert entry is not None and len(entry["x"].unique()) == 1
"""


def test_two_processes_may_write_the_same_entry_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    started, start = os.pipe()  # both writers start when the test closes `start`
    writers = [
        subprocess.Popen([*command, value], env=env, stdin=started, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for value in ("1", "2")
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    os.close(start)
    os.close(started)
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors.decode()
    tensors = DiskCache(tmp_path, 2_000_000).load("key")
    assert tensors is not None
    assert float(tensors["x"][0]) in (1.0, 2.0)
    assert not list(tmp_path.glob("*.part"))


def test_digests_depend_on_shape_dtype_content_and_structure() -> None:
    zeros = torch.zeros(2, 3)
    others = [torch.zeros(3, 2), torch.zeros(2, 3).half(), torch.zeros(2, 3).int(), torch.ones(2, 3)]
    assert len({tensor_digest(tensor) for tensor in (zeros, *others)}) == 5
    assert tensor_digest(zeros.clone()) == tensor_digest(zeros)
    assert tensor_digest(torch.arange(6).view(2, 3).T) == tensor_digest(torch.arange(6).view(2, 3).T.contiguous())
    assert digest("a", "b") != digest("b", "a")
    same = [nn.Linear(3, 3), nn.Linear(3, 3)]
    same[1].load_state_dict(same[0].state_dict())
    assert module_digest(same[0]) == module_digest(same[1])
    assert module_digest(nn.Sequential(same[0], nn.ReLU())) != module_digest(nn.Sequential(same[0], nn.SiLU()))
    same[1].bias.data[1] += 1e-3
    assert module_digest(same[0]) != module_digest(same[1])


def test_the_identity_of_a_statistic_is_its_source_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({stat_identity(cls) for cls in (MinMax, AbsMean, Hessian, Sample)}) == 4
    before = stat_identity(MinMax)
    stat_identity.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert stat_identity(MinMax) != before
    stat_identity.cache_clear()


METHODS = {
    "gptq quantized": ["method=gptq"],
    "gptq float": ["method=gptq", "engine.propagate=float"],
    "gptq at once": ["method=gptq", "method.gptq.true_sequential=false"],
    "smoothquant": ["method=smoothquant"],
    "smoothquant_gptq": ["method=smoothquant_gptq"],
    "awq": ["method=awq", "method.awq.ratios=3", "engine.propagate=float"],
    "static": ["method=rtn", "scheme=w8a8_static"],
}


def configured(*overrides: str) -> RunConfig:
    scheme = [] if any("scheme=" in each for each in overrides) else ["scheme=channel"]
    return build_run(resolve(*TINY, *scheme, *overrides))


def quantized(cfg: RunConfig, cache: DiskCache, change: Callable[[nn.Module], Any] = nn.Module.eval) -> nn.Module:
    model = uneven(build("llama"))
    with torch.no_grad():
        change(model)
    quantize(model, cfg, TOKENS, cache=cache)
    return model


def blocks_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the position of every block that runs on calibration sequences; probes have one sequence."""
    positions: list[int] = []
    run = Stream._run

    def counted(self: Stream, position: int, *arguments: Any) -> Tensor:
        if len(self._states) == len(TOKENS):
            positions.append(position)
        return run(self, position, *arguments)

    monkeypatch.setattr(Stream, "_run", counted)
    return positions


@pytest.mark.parametrize("method", METHODS)
def test_a_warm_cache_gives_the_same_codes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, cache, positions = configured(*METHODS[method]), DiskCache(tmp_path, 2**30), blocks_run(monkeypatch)
    plain = quantized(cfg, DiskCache(tmp_path, 0))
    uncached = len(positions)
    cold = quantized(cfg, cache)
    assert len(positions) == 2 * uncached > 0
    entries = sorted(path.name for path in tmp_path.iterdir())
    warm = quantized(cfg, cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == entries
    expected = plain.state_dict()
    for model in (cold, warm):
        assert list(model.state_dict()) == list(expected)
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name
    if method != "awq":  # its search needs activations
        assert len(positions) == 2 * uncached, "no block runs on calibration sequences"


def test_a_cache_with_half_of_its_entries_is_used_too(tmp_path: Path) -> None:
    for overrides in METHODS["gptq quantized"], METHODS["gptq float"]:
        cfg, cache = configured(*overrides), DiskCache(tmp_path / overrides[-1], 2**30)
        plain = codes_of(quantized(cfg, cache))
        for path in sorted(cache.folder.glob("*.safetensors"))[::2]:
            path.unlink()
        codes = codes_of(quantized(cfg, cache))
        assert all(torch.equal(value, plain[name]) for name, value in codes.items())


def changed(name: str) -> Callable[[nn.Module], Any]:
    return lambda model: model.get_parameter(name).mul_(1.1)


@pytest.mark.parametrize(
    ("weight", "fresh"),
    [
        ("model.layers.1.mlp.up_proj.weight", 2),  # Hessian and Sample of the second block
        ("model.layers.1.input_layernorm.weight", 2),
        ("model.layers.0.mlp.up_proj.weight", 4),
        ("model.embed_tokens.weight", 4),
        ("lm_head.weight", 0),
        ("model.norm.weight", 0),
    ],
)
def test_a_changed_weight_needs_new_entries_from_its_block_on(weight: str, fresh: int, tmp_path: Path) -> None:
    cfg, cache = configured(*METHODS["gptq float"]), DiskCache(tmp_path, 2**30)
    quantized(cfg, cache)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    model = quantized(cfg, cache, changed(weight))
    assert len(list(tmp_path.glob("*.safetensors"))) == 4 + fresh
    plain = codes_of(quantized(cfg, DiskCache(tmp_path, 0), changed(weight)))
    assert all(torch.equal(value, plain[name]) for name, value in codes_of(model).items())


@pytest.mark.parametrize(
    ("overrides", "fresh"),
    [
        (["bits=3", "engine.propagate=float"], 0),  # runs with float propagation share their statistics
        (["bits=3"], 14),  # 16 less 2: only the first group of block 0 has the same inputs
        (["skip=[*.down_proj]", "engine.propagate=float"], 4),
    ],
)
def test_configurations_that_change_the_inputs_need_new_entries(
    overrides: list[str], fresh: int, tmp_path: Path
) -> None:
    cache = DiskCache(tmp_path, 2**30)
    propagate = [each for each in overrides if "propagate" in each]
    quantized(configured("method=gptq", *propagate), cache)
    before = len(list(tmp_path.glob("*.safetensors")))
    quantized(configured("method=gptq", *overrides), cache)
    assert len(list(tmp_path.glob("*.safetensors"))) == before + fresh


def test_without_a_cache_nothing_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[object] = []
    for name in ("module_digest", "tensor_digest"):
        monkeypatch.setattr(observer, name, lambda *each: hashed.append(each) or "0")
    for limit in (0, 2**30):
        assert not hashed
        quantized(configured("method=gptq"), DiskCache(tmp_path, limit))
    assert hashed


def test_other_tokens_need_other_entries(tmp_path: Path) -> None:
    cfg, cache = configured(*METHODS["gptq float"]), DiskCache(tmp_path, 2**30)
    for tokens in (TOKENS, TOKENS.flip(0), TOKENS[:2], TOKENS[:, :8]):
        before = len(list(tmp_path.glob("*.safetensors")))
        quantize(uneven(build("llama")), cfg, tokens, cache=cache)
        assert len(list(tmp_path.glob("*.safetensors"))) == before + 4
