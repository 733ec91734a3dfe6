"""Sweeps that continue: isolated runs that die in several ways; launchers and sweepers in real processes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from harness.config import LimitsConfig, build_limits
from harness.records import Record, store, sweep
from harness.reports import sweeps_sheet
from harness.runs import execute_isolated, execute_run
from harness.utils.progress import text
from tests.conftest import ROOT, TINY, Done, harness, resolve
from tests.support.waiting import ended, until

Tiny = Callable[..., dict[str, Any]]
SMALL = [*TINY, "measure=off", "scheme=channel"]

# Methods that end their process in different ways, or keep it busy until it is ended; each writes the id of its process
# into a file first.
BAD = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
import torch
from harness.core import Method, round_to_nearest

@dataclass(frozen=True, kw_only=True)
class Bad(Method):
    way: str

    def quantize(self, weight, scheme, stats):
        Path(f"{self.way}.pid").write_text(str(os.getpid()))
        if self.way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.way == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.way == "leave":
            os._exit(3)
        if self.way == "wait":
            signal.pause()
        if self.way == "hog":
            memory = torch.ones(3 * 2**27)  # 1.5 GiB
            signal.pause()
        return round_to_nearest(weight, scheme.weight)
"""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A user's folder with the methods of `BAD`."""
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "conf/method").mkdir(parents=True)
    for way in ("kill", "crash", "leave", "wait", "hog"):
        (tmp_path / f"conf/method/{way}.yaml").write_text(f"{way}: {{_target_: bad.Bad, way: {way}}}\n")
    return tmp_path


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


def summary_of(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "sweeps").glob("*.json")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def test_a_run_that_dies_is_a_row_with_its_reason_and_the_sweep_continues(bad: Path) -> None:
    sweep_run = harness(
        *("--config-dir", "conf", "-m", *SMALL, "limits.memory_gib=1.5", "results_dir=runs"),
        "method=none,kill,crash,leave,hog,rtn",
        cwd=bad,
    )
    assert sweep_run.returncode == 1
    by_method = {next(iter(record["config"]["method"] or {"none": 0})): record for record in records(bad / "runs")}
    assert {name: record["status"] for name, record in by_method.items()} == {
        **dict.fromkeys(("kill", "crash", "leave", "hog"), "failed"),
        **dict.fromkeys(("none", "rtn"), "ok"),
    }
    reasons = {
        "kill": "the run was killed (SIGKILL) during kill",
        "crash": "the run's process crashed (SIGSEGV) during crash",
        "leave": "the run's process ended by itself with exit code 3 during leave",
        "hog": "limits.memory_gib=1.5 is exceeded: ",
    }
    for name, reason in reasons.items():
        assert by_method[name]["error"].startswith(reason), by_method[name]["error"]
        assert f"error: tiny {name} channel bits=4: {reason}" in sweep_run.stderr
        assert by_method[name]["environment"]["cores"] == os.cpu_count()
    assert sweep_run.stdout.count("| failed") == 4
    summary = summary_of(bad / "runs")
    assert (summary["runs"], summary["ok"], summary["failed"], summary["skipped"]) == (6, 2, 4, 0)
    assert sum(summary["stages"].values()) == pytest.approx(summary["wall_s"], rel=0.01)
    work_s = sum(summary["stages"].get(name, 0) for name in sweep.WORK)
    assert summary["own_share"] == pytest.approx(1 - work_s / summary["wall_s"], rel=0.01)


def test_the_run_of_a_killed_sweep_ends_too_and_the_sweep_can_be_continued(
    bad: Path, command: Callable[..., Done]
) -> None:
    sweep_run = [sys.executable, "-m", "harness", "--config-dir", "conf", "-m", *SMALL, "results_dir=runs"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*sweep_run, "method=rtn,wait"], cwd=bad, env=env, stdout=-3, stderr=-3)
    pid_file = bad / "wait.pid"
    until(lambda: process.poll() is not None or (pid_file.exists() and pid_file.read_text()))
    run = psutil.Process(int(pid_file.read_text()))
    process.kill()
    process.wait()
    try:
        until(lambda: ended(run))
    finally:
        with suppress(psutil.NoSuchProcess):
            run.kill()
    assert [record["status"] for record in records(bad / "runs")] == ["ok"]
    again = command("-m", *SMALL, f"results_dir={bad}/runs", "method=rtn,hqq", "isolate=false")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("skip  tiny") == 1
    assert len(records(bad / "runs")) == 2


def test_a_run_that_exceeds_its_time_is_ended(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps once the run has reached its method, so that the test does not depend on the machine's speed."""
    labels: list[str] = []

    def track(items: Any, label: Any, total: int | None = None) -> Generator[Any, None, None]:
        for item in items:
            labels.append(text(label))
            yield item

    def clock() -> float:
        return time.monotonic() + 1000 * any(label.startswith("gptq") for label in labels)

    monkeypatch.setattr("harness.runs.isolate.time", SimpleNamespace(monotonic=clock))
    record, skipped = execute_isolated(tiny("method=gptq"), LimitsConfig(time_s=900), track)
    assert (record.status, skipped) == ("failed", False)
    assert re.match(
        r"limits\.time_s=900 is exceeded: the run was in gptq block 1/2.* after 1\d\d\d s; raise the limit",
        record.error or "",
    )


def test_an_isolated_run_gives_the_same_record(tiny: Tiny, tmp_path: Path) -> None:
    direct, _ = execute_run(tiny("method=gptq", "bits=3"))
    labels: list[str] = []

    def track(items: Any, label: Any, total: int | None = None) -> Generator[Any, None, None]:
        for item in items:
            yield item
            labels.append(text(label))

    raw = tiny("method=gptq", "bits=3", f"results_dir={tmp_path}/other")
    isolated, skipped = execute_isolated(raw, LimitsConfig(), track)
    assert (isolated.status, isolated.error, skipped) == ("ok", None, False)
    assert isolated.run_id == direct.run_id
    assert isolated.window_nll == direct.window_nll
    assert isolated.layers == direct.layers
    assert store.read(tmp_path / f"other/{isolated.run_id}.json") == isolated
    assert "perplexity" in labels
    assert any("gptq block 2/2, error" in label for label in labels)
    assert execute_isolated(raw, LimitsConfig()) == (isolated, True)


def test_runs_of_sweeps_and_runs_with_limits_are_isolated_by_default() -> None:
    def limits(sweeping: bool, *overrides: str) -> LimitsConfig | None:
        return build_limits(resolve(*overrides), sweeping)

    assert limits(True) == limits(False, "isolate=true") == LimitsConfig()
    assert limits(False) is limits(True, "isolate=false") is None
    assert limits(False, "limits.time_s=3") == LimitsConfig(time_s=3.0)
    for overrides, message in [
        (["isolate=maybe"], "isolate='maybe' has type str; expected bool"),
        (["isolate=false", "limits.time_s=3"], "isolate=False cannot enforce limits.memory_gib or limits.time_s"),
        (["limits.memory_gib=0"], "limits.memory_gib=0.0 is out of range; expected more than 0"),
        (["objectives=[[nll]]"], "objectives\\[0\\]=\\['nll'\\] has type list; expected str"),
    ]:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            limits(True, *overrides)


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB; the test is skipped if mounting one is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=3m"):
        pytest.skip(f"mounting a file system is not allowed here ({os.strerror(ctypes.get_errno())})")
    try:
        yield folder
    finally:
        libc.umount2(str(folder).encode(), 2)


def test_a_full_disk_is_reported_and_loses_nothing(small_disk: Path, tiny: Tiny) -> None:
    first, _ = execute_run(tiny(f"results_dir={small_disk}"))
    assert first.status == "ok"
    (small_disk / "other").write_bytes(bytes(2 * 2**20 + 2**19))
    full, _ = execute_run(tiny("bits=3", f"results_dir={small_disk}"))
    assert full.status == "failed"
    assert f"results_dir={small_disk} cannot be written (No space left on device); free space" in str(full.error)
    assert [path.name for path in small_disk.glob("*.json")] == [f"{first.run_id}.json"]
    (small_disk / "other").unlink()
    assert execute_run(tiny("bits=3", f"results_dir={small_disk}"))[0].status == "ok"


def test_a_record_that_does_not_fit_on_the_disk_is_written_elsewhere(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_record: Record, _folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("harness.records.write", full)
    record, _ = execute_run(tiny())
    assert record.status == "failed"
    file = Path(str(record.error).partition("it was written to ")[2].partition(" instead")[0])
    rescued = store.read(file)
    assert (rescued.status, rescued.run_id) == ("ok", record.run_id)
    assert rescued.metrics["perplexity"] > 0


# Launchers and sweepers, in a separate process, as a user runs them.


def test_entries_and_their_summary(tmp_path: Path) -> None:
    for number, work, skipped in ((1, 6.0, False), (0, 2.0, False), (2, 9.0, True)):
        record = Record(f"run{number}", stages={"load": 1.0, "evaluate": work})
        sweep.note(tmp_path / "s", sweep.entry_of(number, record, skipped, 0.5 if skipped else work + 1.5))
    entries = sweep.entries(tmp_path / "s")
    assert [entry.run_id for entry in entries] == ["run0", "run1", "run2"]
    summary = sweep.summary(entries, wall_s=13.0)
    assert summary["stages"] == {"load": 2.0, "evaluate": 8.0, "other": pytest.approx(3.0)}
    assert summary["own_s"] == pytest.approx(5.0)
    assert summary["own_share"] == pytest.approx(5 / 13)
    in_parallel = sweep.summary(entries, wall_s=7.5)
    assert in_parallel["own_share"] == pytest.approx(3.5 / 11.5), "a share of the times of all runs together"
    path = sweep.write_summary(tmp_path / "s", summary)
    assert path == tmp_path / "s.json"
    assert json.loads(path.read_text())["runs"] == 3
    (tmp_path / "sweeps").mkdir()
    path.rename(tmp_path / "sweeps/s.json")
    sheet = sweeps_sheet(tmp_path)
    assert sheet.shown.iloc[0].to_dict() == {
        **{"sweep": "s", "runs": "3", "ok": "3", "failed": "0", "skipped": "1"},
        **{"wall": "13", "load": "2.0", "other": "3.0", "evaluate": "8.0", "own share": "38.5%"},
    }


@pytest.mark.parametrize(
    ("launcher", "isolate"), [("workers", True), ("submitit_local", False), ("ray_cluster", False)]
)
def test_every_record_of_a_launcher_arrives_once(launcher: str, isolate: bool, tmp_path: Path) -> None:
    output = harness(
        *("-m", *SMALL, f"hydra/launcher={launcher}", f"isolate={isolate}", f"results_dir={tmp_path}", "method=rtn"),
        *("scheme=group32", "scheme.weight.group_size=32,96,64"),
        RAY_AUTH_MODE="disabled",
    )
    assert output.returncode == 1, output.stderr
    assert "scheme.weight.group_size=96 does not divide" in output.stdout
    written = records(tmp_path)
    assert sorted(record["status"] for record in written) == ["failed", "ok", "ok"]
    (folder,) = (path for path in (tmp_path / "sweeps").iterdir() if path.is_dir())
    entries = sweep.entries(folder)
    assert [entry.number for entry in entries] == [0, 1, 2]
    assert {entry.run_id for entry in entries} == {record["run_id"] for record in written}
    assert summary_of(tmp_path)["runs"] == 3
    assert output.stdout.count("| rtn ") == 3


def test_the_configuration_of_slurm_fits_its_launcher() -> None:
    cfg = resolve_hydra("hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    assert cfg["launcher"]["_target_"].endswith("SlurmLauncher")
    assert cfg["launcher"]["partition"] == "gpu"
    assert cfg["launcher"]["submitit_folder"].startswith("results/runs/sweeps/")


def resolve_hydra(*overrides: str) -> dict[str, Any]:
    """The resolved configuration of Hydra's launcher."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("config", list(overrides), return_hydra_config=True)
        cfg.hydra.job.num = 0
        cfg.hydra.runtime.output_dir = "."
        return {"launcher": OmegaConf.to_container(cfg.hydra.launcher, resolve=True)}


def test_optuna_finds_the_pareto_front_of_two_metrics(tmp_path: Path) -> None:
    output = harness(
        *("experiment=pareto", *SMALL[:-1], f"results_dir={tmp_path}", "hydra.sweeper.n_trials=6", "isolate=false"),
        "hydra.sweeper.params={method:rtn,scheme:'choice(channel,group32)',bits:'choice(2,4,9)'}",
    )
    ok = [record for record in records(tmp_path) if record["status"] == "ok"]
    assert ok, output.stderr
    points = {(record["metrics"]["nll"], record["metrics"]["bits_per_weight"]) for record in ok}
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    (path,) = (tmp_path / "sweeps").glob("*/optimization_results.yaml")
    from omegaconf import OmegaConf

    front = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(front, dict)
    assert {tuple(solution["values"]) for solution in front["solutions"]} == best
    assert summary_of(tmp_path)["runs"] == 6


def test_an_unknown_launcher_names_the_extra(command: Callable[..., Done]) -> None:
    output = command("-m", *SMALL, "hydra/launcher=kubernetes")
    assert output.returncode == 1
    assert output.stderr.startswith("error: hydra/launcher=kubernetes is unknown; ")
    assert "pip install 'ptqbench[sweeps]'" in output.stderr
