"""Exports in other libraries: an engine that computes the same has no error, one that fails has its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from benchmarks.compose import configuration
from benchmarks.engines import exports, run
from benchmarks.engines.cases import CASES, Case
from benchmarks.engines.engines import Engine
from benchmarks.engines.table import markdown


class Own(Engine):
    """An engine that reads the folder as this project does."""

    def load(self, folder: Path) -> nn.Module:
        return run._ours(folder)


class Absent(Engine):
    def load(self, folder: Path) -> nn.Module:
        raise ImportError("no such library")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "MODEL", "tiny")


@pytest.mark.parametrize("export", ["gptq", "compressed-tensors"])
def test_a_row_for_each_engine(export: str) -> None:
    engines = (Own("own", ("torch", "no-such-package")), Absent("absent", ()))
    own, absent = run._rows(Case(export, ("scheme=group64_sym", "bits=4"), engines))
    assert own["error"] == 0
    assert "no such library" in absent["reason"]
    versions = engines[0].versions
    assert versions["torch"] is not None
    assert versions["no-such-package"] is None
    text = markdown({"command": "x", "model": "tiny", "prompt": 64, "versions": versions, "rows": [own, absent]})
    assert f"| {export} | scheme=group64_sym bits=4 | own | 0.0e+00 |" in text
    assert "- absent: ImportError: no such library" in text
    assert "no-such-package" not in text


def test_widths_of_a_case_are_those_of_the_folder(tmp_path: Path) -> None:
    exports.write(Case("compressed-tensors", ("scheme=group64_sym", "bits=4"), (), {"down_proj": 8}), tmp_path / "q")
    cfg = configuration("execution=simulated", "method=checkpoint", f"model.path={tmp_path / 'q'}")
    reader = run.open_quantized(cfg.model, 0).reader
    bits = {name: reader.read(name).weight.fmt.bits for name in reader.linears}  # type: ignore[attr-defined]
    assert {bits[name] for name in bits if "down_proj" in name} == {8}
    assert {bits[name] for name in bits if "down_proj" not in name} == {4}


def test_cases_differ() -> None:
    names = [run._name(case) for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.engines for case in CASES)
