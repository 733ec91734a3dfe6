"""A GGUF file is parsed once, as the package parses it, and again after it changed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoConfig

from harness.models import gguf_reading
from harness.models.exchange.gguf_file import write_gguf
from tests.support.families import build


def write(file: Path, size: int = 32) -> Path:
    write_gguf(file, "tiny", build("llama", hidden_size=size), {}, None)
    return file


def test_a_reader_is_that_of_the_package(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf")
    ours, theirs = gguf_reading.opened(file), gguf.GGUFReader(file)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents(), name
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (mine.name, mine.tensor_type) == (other.name, other.tensor_type)
        assert np.array_equal(mine.data, other.data)


def test_a_file_is_parsed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    build_fields = gguf.GGUFReader._build_fields
    monkeypatch.setattr(
        gguf.GGUFReader, "_build_fields", lambda self, *args: (parsed.append(1), build_fields(self, *args))[1]
    )
    file = write(tmp_path / "model.gguf")
    with gguf_reading.once():
        for _ in range(2):
            assert AutoConfig.from_pretrained(tmp_path, gguf_file=file.name).hidden_size == 32
    assert gguf_reading.opened(file) is gguf_reading.opened(file)
    assert len(parsed) == 1
    assert gguf_reading.opened(write(file, 64)).get_field("llama.embedding_length").contents() == 64
    assert len(parsed) == 2


def fails() -> None:
    with gguf_reading.once():
        assert gguf.GGUFReader is gguf_reading.opened
        raise KeyError


def test_the_package_is_itself_again_after_an_error() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(KeyError):
        fails()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
