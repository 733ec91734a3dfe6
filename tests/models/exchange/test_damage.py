"""Damaged checkpoints end in one line, and in no other exception: truncated, a shard missing, random bytes."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

from harness.models.checkpoint import reading
from harness.models.exchange.gguf import GGUF
from harness.utils.errors import LIMIT
from tests.models.exchange.test_integers import encode_gptq, source_of
from tests.models.exchange.test_libraries import FOLDERS
from tests.support import checkpoints as made

TRIES = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    made.quantized(made.floats(root / "float"), root / "gptq", {"quant_method": "gptq", "bits": 4}, encode_gptq)
    return root / "gptq"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def opened(folder: Path) -> None:
    source = source_of(folder)
    model = source.load(torch.float32, torch.device("cpu"))
    list(source.stored(model))


def line_of(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"^model.path=") as caught:
        opened(folder)
    line = str(caught.value)
    assert len(line) <= LIMIT
    assert "\n" not in line
    return line


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, removed or added, most often near the start, where headers are."""
    place = chance.randrange(len(content)) if chance.random() < 0.3 else chance.randrange(min(len(content), 4096))
    kind = chance.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + chance.randbytes(chance.randint(1, 8)) + content[place:]
    if kind == 2:
        return content[:place] + content[place + chance.randint(1, 8) :]
    new = chance.randbytes(chance.randint(1, 8))
    return content[:place] + new + content[place + len(new) :]


def lines_of(file: Path, tries: int) -> list[str]:
    """The errors of the folder of `file`, which is damaged in another way at each try."""
    content, chance, lines = file.read_bytes(), random.Random(0), list[str]()
    for _ in range(tries):
        file.write_bytes(damaged(content, chance))
        try:
            opened(file.parent)
        except ValueError as error:
            lines.append(str(error))
    return lines


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_random_damage_of_a_folder(copy: Path, file: str) -> None:
    lines = lines_of(copy / file, TRIES)
    assert all(len(line) <= LIMIT and "\n" not in line for line in lines)
    assert len(lines) > TRIES // 4  # what only changes a weight, or a setting that does not matter, cannot be seen


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_random_damage_of_the_files_of_libraries(folder: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(folder, tmp_path / "copy"))
    files = [work / "model.safetensors", *work.glob("quanto_qmap.json")]
    lines = [lines_of(file, TRIES // 2) for file in files]
    assert all(len(line) <= LIMIT and "\n" not in line for some in lines for line in some)
    assert all(len(some) > TRIES // 8 for some in lines)


def test_a_truncated_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is damaged" in line_of(copy)


def test_a_missing_shard(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    shards = {"one.safetensors": names[:half], "two.safetensors": names[half:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, copy / shard, {"format": "pt"})
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    opened(copy)
    (copy / "two.safetensors").unlink()
    assert "two.safetensors is missing, 1 of the 2 weight files are" in line_of(copy)


def test_a_header_of_absurd_size(copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    assert "model.safetensors is damaged" in line_of(copy)


def test_a_wrong_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, copy / "model.safetensors", {"format": "pt"})
    assert "up_proj.scales is float16" in line_of(copy)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(50)])
    values = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    for name, kind in (("a", GGMLQuantizationType.Q8_0), ("b", GGMLQuantizationType.Q4_0)):
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def matrices(file: Path) -> list[str]:
    with reading("model.path=x", "download it again"):
        found = GGUF(file).matrices
        for matrix in found:
            matrix.decoded()
    return [matrix.name for matrix in found]


def test_random_damage_of_a_gguf_file(gguf: bytes, tmp_path: Path) -> None:
    file, chance, lines = tmp_path / "x.gguf", random.Random(0), list[str]()
    file.write_bytes(gguf)
    assert matrices(file) == ["a", "b"]
    for _ in range(TRIES):
        file.write_bytes(damaged(gguf, chance))
        try:
            matrices(file)
        except ValueError as error:
            lines.append(str(error))
    assert all(len(line) <= LIMIT and "\n" not in line for line in lines)
    assert len(lines) > TRIES // 4


@pytest.mark.parametrize("offset", [8, 16], ids=["tensors", "keys"])
def test_a_gguf_header_of_absurd_size(gguf: bytes, tmp_path: Path, offset: int) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf[:offset] + struct.pack("<Q", 1 << 60) + gguf[offset + 8 :])
    with pytest.raises(ValueError, match=r"^model.path=x cannot be read \(x.gguf is damaged"):
        matrices(file)
