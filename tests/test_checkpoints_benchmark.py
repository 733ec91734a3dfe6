"""The files of other tools: each is whole or absent, and what is there stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoints.files import once
from tests.conftest import ROOT


def test_a_file_that_is_not_finished_has_not_its_name(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        once(target, fail)
    assert not target.exists()
    once(target, lambda part: part.write_text("whole"))
    once(target, lambda part: part.write_text("again"))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.gguf", "whole")]


def test_a_folder_replaces_the_rest_of_an_earlier_try(tmp_path: Path) -> None:
    (tmp_path / "part-q").mkdir()
    (tmp_path / "part-q" / "old").touch()

    def write(part: Path) -> None:
        part.mkdir()
        (part / "new").touch()

    once(tmp_path / "q", write)
    assert [file.name for file in tmp_path.rglob("*")] == ["q", "new"]


def test_the_experiment_measures_what_the_tools_write() -> None:
    """Names of files are written twice: in the tools, which do not import the harness, and in the experiment."""
    from benchmarks.checkpoints import calibrated, llama_cpp, ours

    listed = (ROOT / "conf" / "experiment" / "checkpoints.yaml").read_text()
    names = [f"llama.cpp_{name}.gguf" for name in llama_cpp.TYPES]
    names += [f"auto-round_{bits}" for bits in calibrated.WIDTHS]
    names += [f"{name}/model.gguf" if "export=gguf" in options else name for name, options in ours.EXPORTS.items()]
    for name in names:
        assert f"${{model.name}}/{name}" in listed, name
