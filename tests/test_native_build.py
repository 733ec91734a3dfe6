"""setup.py builds the native library where it can, and where the package looks; here from one line of C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.kernels.native import library
from tests.conftest import ROOT

NATIVE = Path("harness/kernels/native")
NOT_BUILT = "the native kernels were not built, torch's kernels will run: "
compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree, in which `library` then looks for what was built."""
    (tmp_path / NATIVE).mkdir(parents=True)
    for file in ("setup.py", NATIVE / "library.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / NATIVE / "value.cpp").write_text("int value = 1;\n")
    monkeypatch.setattr(library, "__file__", str(tmp_path / NATIVE / "library.py"))
    monkeypatch.setattr(library, "_register_fakes", lambda: None)  # this library has no operators
    monkeypatch.delenv("PTQBENCH_NATIVE", raising=False)
    return tmp_path


def build(tree: Path, **environment: str) -> str:
    """What a successful build reports as warnings and errors."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def problem() -> str:
    """Why the library of the tree cannot be used, without what to do; empty if it can."""
    return (library.problem.__wrapped__() or "").partition(";")[0]


def outputs(tree: Path) -> set[str]:
    """Names of the files that a wheel would get from the build."""
    return {file.name for file in (tree / "build").glob(f"lib*/{NATIVE}/*")}


@compiled
def test_the_library_and_the_digest_of_its_sources_are_where_the_package_looks(tree: Path) -> None:
    assert NOT_BUILT not in build(tree)
    assert problem() == ""
    assert outputs(tree) == {"_native.so", "_native.sources"}


@pytest.mark.parametrize("reason", ["PTQBENCH_NATIVE=0", "no torch"])
def test_it_is_left_out(reason: str, tree: Path) -> None:
    if reason == "no torch":
        (tree / "torch.py").write_text("raise ImportError\n")
    environment = {"PTQBENCH_NATIVE": "0"} if reason == "PTQBENCH_NATIVE=0" else {}
    assert NOT_BUILT not in build(tree, **environment)
    assert problem() == "not built"
    assert not (tree / "build").exists()


def test_without_a_compiler_the_build_says_so_and_succeeds(tree: Path) -> None:
    assert NOT_BUILT in build(tree, CXX="/no/compiler")
    assert problem() == "not built"
    assert outputs(tree) == set()


@compiled
def test_a_failed_build_does_not_give_an_older_library_the_digest_of_new_sources(tree: Path) -> None:
    build(tree)
    (tree / NATIVE / "value.cpp").write_text("int value = 2;\n")
    assert NOT_BUILT in build(tree, LDFLAGS="-lno_such_library")
    assert problem() == "built from other sources"
