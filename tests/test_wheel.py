"""The wheel: built once, installed into a folder of its own, and used from other folders without the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.cli import main
from harness.cli.main import COMMANDS, conf_folder
from harness.runs.sources import Sources
from tests.conftest import ROOT, TINY

RUN = (*TINY, "measure=off")
EXTRA = ("altair", "vl_convert", "itables", "jinja2")
PACKAGES = ("harness", "methods", "hydra_plugins")
# Python runs a module of this name at its start. This one removes the editable install of the checkout, which would
# otherwise supply every module that the wheel lacks.
SITECUSTOMIZE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
sys.path[:] = [place for place in sys.path if not place.startswith("__editable__")]
"""


@dataclass(frozen=True)
class Wheel:
    """A wheel, the source tree that it was built from, and the folder that it is installed in."""

    file: Path
    source: Path
    folder: Path

    def run(self, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in `cwd`, with the wheel's modules and without those of the checkout."""
        path = os.pathsep.join(map(str, (self.folder, self.folder.parent / "start")))
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    def ptqbench(self, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the installed script."""
        return self.run(cwd, str(self.folder / "bin/ptqbench"), *arguments)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Built from a copy of the checkout, so that nothing is left in it and no earlier build is read.

    Without the native kernels, whose compilation takes a minute.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".*", "build", "results", "*.egg-info", "__pycache__", "*.so", "*.sources")
    shutil.copytree(ROOT, source, ignore=unwanted)
    _pip("wheel", "--no-build-isolation", f"--wheel-dir={folder}", str(source))
    (file,) = folder.glob("*.whl")
    _pip("install", "--no-compile", f"--target={folder / 'installed'}", str(file))
    (folder / "start").mkdir()
    (folder / "start/sitecustomize.py").write_text(SITECUSTOMIZE)
    return Wheel(file, source, folder / "installed")


def _pip(command: str, *arguments: str) -> None:
    fixed = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *fixed, *arguments],
        env={**os.environ, "PTQBENCH_NATIVE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_it_has_every_file_of_its_packages_and_no_other(wheel: Wheel) -> None:
    modules = {file.relative_to(wheel.source) for name in PACKAGES for file in (wheel.source / name).rglob("*.*")}
    conf = {"harness" / file.relative_to(wheel.source) for file in (wheel.source / "conf").rglob("*.yaml")}
    names = {Path(name) for name in zipfile.ZipFile(wheel.file).namelist()}
    assert {name for name in names if not name.parts[0].endswith(".dist-info")} == modules | conf
    assert Path("harness/reports/html/templates/report.html") in names
    assert len(conf) > 50


def test_its_modules_are_imported_and_not_those_of_the_checkout(wheel: Wheel, tmp_path: Path) -> None:
    names = ["harness", "harness.cli.run", "methods.rtn", "methods.peers", "hydra_plugins.union_sweeper"]
    show = (
        "import importlib, json, sys\n"
        "from harness.cli.main import conf_folder\n"
        "files = [importlib.import_module(name).__file__ for name in sys.argv[1:]]\n"
        "print(json.dumps([*files, str(conf_folder())]))"
    )
    done = wheel.run(tmp_path, sys.executable, "-c", show, *names)
    assert done.returncode == 0, done.stderr
    places = [Path(file) for file in json.loads(done.stdout)]
    assert all(place.is_relative_to(wheel.folder) for place in places), places
    assert places[-1] == wheel.folder / "harness/conf"
    assert conf_folder() == ROOT / "conf"
    missing = wheel.run(tmp_path, sys.executable, "-c", "import benchmarks, tests.conftest")
    assert "ModuleNotFoundError" in missing.stderr


def test_run_table_and_report(wheel: Wheel, tmp_path: Path, command: Callable[..., object]) -> None:
    done = wheel.ptqbench(tmp_path, *RUN, "method=gptq", "bits=4", "scheme=group32")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results/runs").glob("*.json")
    record = json.loads(file.read_text())
    assert record["status"] == "ok"
    assert not record["environment"].get("commit")

    command(*RUN, "method=gptq", "bits=4", "scheme=group32", f"results_dir={tmp_path / 'checkout'}")
    same = json.loads((tmp_path / "checkout" / file.name).read_text())
    assert record["code"] == same["code"]
    assert record["metrics"]["perplexity"] == pytest.approx(same["metrics"]["perplexity"], rel=1e-5)

    table = wheel.ptqbench(tmp_path, "table")
    assert table.returncode == 0, table.stderr
    assert "gptq" in table.stdout

    report = wheel.ptqbench(tmp_path, "report")
    if all(importlib.util.find_spec(name) for name in EXTRA):
        assert report.returncode == 0, report.stderr
        assert record["run_id"] in (tmp_path / "results/runs/report.html").read_text()
    else:
        assert report.stderr.endswith("run pip install ptqbench[report]\n")


def test_sweep_over_a_method_of_the_current_folder(wheel: Wheel, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        '"""Rounds to nearest."""\n'
        "from dataclasses import dataclass\n"
        "from harness.core import Method\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Method):\n"
        '    """Rounds to nearest."""\n'
    )
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/mine.yaml").write_text("mine:\n  _target_: mine.Mine\n")
    sweep = ["--config-dir", "conf", "-m", "hydra/sweeper=union", "hydra.sweeper.sweeps=['method=mine bits=3,4']"]
    done = wheel.ptqbench(tmp_path, *sweep, *RUN)
    assert done.returncode == 0, done.stderr
    records = [json.loads(file.read_text()) for file in (tmp_path / "results/runs").glob("*.json")]
    assert sorted(record["config"]["bits"] for record in records if "mine" in record["config"]["method"]) == [3, 4]
    assert all(record["status"] == "ok" for record in records)


def test_libraries_in_the_folder_of_a_wheel_do_not_count_as_its_code(tmp_path: Path) -> None:
    (tmp_path / "method.py").write_text("import library\n")
    (tmp_path / "library.py").write_text("value = 1\n")
    assert set(Sources((tmp_path,)).closure(["method"])) == {"method", "library"}
    folder = tmp_path / "installed"
    (folder / "library-1.0.dist-info").mkdir(parents=True)
    for name in ("method.py", "library.py"):
        (tmp_path / name).rename(folder / name)
    assert set(Sources((folder,), frozenset({"method"})).closure(["method"])) == {"method"}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_each_command_prints_its_help(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, flag]) == 0
    shown = capsys.readouterr()
    assert f"    python -m harness {name}" in shown.out.replace(f"harness.{name}", f"harness {name}")
    assert shown.err == ""


def test_help_of_runs_is_hydras(command: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command("--help")
    assert stop.value.code == 0
    assert "python -m harness KEY=VALUE" in capsys.readouterr().out
