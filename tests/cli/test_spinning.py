"""How long waiting threads spin: limited by the command line, unless the environment already says it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.cli import main
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_the_command_line_limits_spinning_unless_the_environment_decides(
    environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that the end of the test restores it
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_importing_the_command_line_does_not_import_torch() -> None:
    code = "import sys, harness.cli; sys.exit('torch' in sys.modules)"  # OpenMP reads its environment with torch
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
