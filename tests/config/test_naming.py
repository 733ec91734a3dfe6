"""The source of weights that a run uses if the configuration has several, and the name that is shown for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.config import build_run, folder_name, one_source
from tests.conftest import Done, resolve

SMOLLM2 = {"name": "smollm2", "package": "llm==1", "id": None, "path": None, "architecture": None}
GPT2 = {"name": "gpt2", "package": None, "id": "org/gpt2", "path": None, "architecture": None}


@pytest.mark.parametrize(
    ("model", "typed", "name", "source"),
    [
        (SMOLLM2, {}, "smollm2", "package"),
        (SMOLLM2, {"path": "a/my_llama"}, "my_llama", "path"),
        (SMOLLM2, {"id": "org/opt"}, "org/opt", "id"),
        (SMOLLM2, {"id": "org/opt", "name": "mine"}, "mine", "id"),
        (SMOLLM2, {"package": "other==2"}, "other", "package"),
        (GPT2, {}, "gpt2", "id"),
        (GPT2, {"id": "org/opt"}, "org/opt", "id"),
        (GPT2, {"package": "other==2"}, "other", "package"),
        (GPT2, {"path": "a/my_llama"}, "my_llama", "path"),
    ],
)
def test_the_source_on_the_command_line_is_used(
    model: dict[str, Any], typed: dict[str, str], name: str, source: str
) -> None:
    section = one_source(model | typed, typed)
    assert section["name"] == name
    assert [key for key in ("path", "id", "package", "architecture") if section[key] is not None] == [source]


def test_two_sources_and_a_name_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^model.path=a and model.id=b are two sources of weights; expected one"):
        one_source(SMOLLM2 | {"path": "a", "id": "b"}, {"path", "id"})
    with pytest.raises(ValueError, match=r"^model.name=mine has no effect with model.path=a"):
        one_source(SMOLLM2 | {"path": "a", "name": "mine"}, {"path", "name"})


def test_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_name(".") == tmp_path.name
    assert folder_name("a/b/../c/") == "c"
    assert folder_name("hub/models--org--small/snapshots/0123") == "org/small"


def test_a_typed_configuration_has_the_shown_name() -> None:
    assert build_run(resolve("model.path=some/my_llama")).model.name == "my_llama"
    cfg = build_run(resolve("model.id=org/opt")).model
    assert (cfg.name, cfg.source, cfg.package) == ("org/opt", "id", None)


def test_the_command_line_shows_the_name_of_what_it_was_asked_for(command: Any, tmp_path: Path) -> None:
    (tmp_path / "my_llama").mkdir()
    base = ("measure=off", f"results_dir={tmp_path}")
    for arguments, start in (
        ((f"model.path={tmp_path}/my_llama",), f"error: my_llama rtn group64 bits=4: model.path={tmp_path}"[:60]),
        (("model=gpt2", "model.id=org/none"), "error: org/none rtn group64 bits=4: model.id=org/none could not be"),
        (("model.id=org/none", "model.path=b"), "error: model.path=b and model.id=org/none are two sources"),
    ):
        done: Done = command(*base, *arguments)
        assert done.returncode == 1
        assert start in done.stderr.replace("\n", " ")
        assert "smollm2 " not in done.stderr
