"""Complete runs on random weights: records, skipped runs, failures, sweeps, and the output of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import MissingConfigException

from harness import models
from harness.config import build_run
from harness.kernels.native import library
from harness.models import Source
from harness.records import store
from harness.runs import execute_run
from tests.conftest import ROOT, TINY, Done, harness, resolve, run_id_of
from tests.support.waiting import descendants, ended, until

Tiny = Callable[..., dict[str, Any]]
Command = Callable[..., Done]
SWEEP = [*TINY, "measure=off"]


def native(name: str, other: str) -> str:
    """The name of the kernel that runs: of the native library where it is built, otherwise of torch."""
    return name if library.available() else other


def test_record_of_a_run(tiny: Tiny, tmp_path: Path) -> None:
    record, skipped = execute_run(tiny("bits=3", "measure=quick", "measure.prompt_len=8", "measure.repeats=2"))
    assert (record.status, record.error, skipped) == ("ok", None, False)
    assert store.read(tmp_path / f"{record.run_id}.json") == record
    assert record.config["scheme"]["weight"]["bits"] == 3
    assert record.execution.mode == "packed"
    assert record.execution.kernel == native("native_int3", "reference")
    assert record.data.protocol == "gptq-64"
    assert len(record.data.evaluation.tokens_sha256) == 64
    assert len(record.window_nll) == record.data.evaluation.num_windows == 2
    assert set(record.stages) == {"data", "load", "quantize", "evaluate", "divergence", "measure"}
    assert record.metrics["bits_per_weight"] == 3 + 19 / 64
    assert {"perplexity", "nll", "model_size_mib", "peak_memory_mib", "quantize_s"} <= set(record.metrics)
    for kind in ("prefill", "decode"):
        low, mid, high = (record.metrics[f"{kind}_ms_p{p}"] for p in (10, 50, 90))
        assert 0 < low <= mid <= high
        assert record.metrics[f"{kind}_speedup"] > 0
    assert len(record.layers) == 14
    assert all(0 < layer["weight_error"] < 0.5 for layer in record.layers)
    lost = sum((layer["weight_error"] * layer["weight_norm"]) ** 2 for layer in record.layers)
    total = sum(layer["weight_norm"] ** 2 for layer in record.layers)
    assert record.metrics["total_weight_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-12)


def test_simulated_runs_claim_no_speed_and_no_memory(tiny: Tiny) -> None:
    packed = execute_run(tiny("measure=quick", "measure.prompt_len=8"))[0]
    simulated = execute_run(tiny("measure=quick", "measure.prompt_len=8", "execution=simulated"))[0]
    assert packed.run_id != simulated.run_id
    assert simulated.execution.mode == "simulated"
    assert simulated.execution.kernel is None
    assert not [name for name in simulated.metrics if "_ms_" in name or "speedup" in name or name == "peak_memory_mib"]
    for name in ("perplexity", "bits_per_weight", "model_size_mib"):
        assert simulated.metrics[name] == packed.metrics[name]


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        (("scheme=group32", "model.dtype=bfloat16"), native("native_int4", "cpu_w4a16")),
        (("scheme=group32_sym", "model.dtype=bfloat16"), native("native_int4", "cpu_w4a16")),
        (("scheme=channel", "bits=8", "model.dtype=bfloat16"), native("native_int8", "cpu_w8a16")),
        (("scheme=group64", "bits=3", "model.dtype=bfloat16"), native("native_int3", "reference")),
        (("scheme=w8a8_token",), native("native_w8a8", "cpu_w8a8")),
        (("scheme=w8a8_tensor",), native("native_w8a8", "cpu_w8a8")),
        (("scheme=w8a8_static",), native("native_w8a8", "cpu_w8a8")),
        (("method=llm_int8", "scheme.activation.threshold=2"), native("native_llm_int8", "cpu_llm_int8")),
        (
            ("method=gptq", "scheme=group32", "method.gptq.static_groups=false", "model.dtype=bfloat16"),
            native("native_int4", "cpu_w4a16"),
        ),
    ],
)
def test_packed_and_simulated_runs_agree(tiny: Tiny, options: tuple[str, ...], kernel: str) -> None:
    if kernel in ("cpu_w8a8", "cpu_llm_int8") and not torch.cpu._is_vnni_supported():
        kernel = "reference"
    packed, simulated = (execute_run(tiny(*options, f"execution={how}"))[0] for how in ("packed", "simulated"))
    assert packed.status == "ok", packed.error
    assert packed.execution.kernel == kernel
    assert packed.metrics["perplexity"] == pytest.approx(simulated.metrics["perplexity"], rel=1e-3)
    assert packed.metrics["bits_per_weight"] == simulated.metrics["bits_per_weight"]


def test_a_model_that_is_not_scored_is_only_measured(tiny: Tiny) -> None:
    record = execute_run(tiny("model.scored=false", "measure=quick", "measure.prompt_len=8"))[0]
    assert record.status == "ok", record.error
    assert "perplexity" not in record.metrics
    assert record.window_nll == []
    assert record.metrics["decode_ms_p50"] > 0
    assert record.metrics["peak_memory_mib"] > record.metrics["resident_mib"]
    assert any("has random weights: no perplexity is computed" in warning for warning in record.warnings)
    refused = execute_run(tiny("model.scored=false"))[0]
    assert "measure.latency=False leaves nothing to do" in str(refused.error)


@pytest.mark.parametrize(("built", "device", "warned"), [(True, "cpu", 1), (False, "cpu", 0), (True, "cuda", 0)])
def test_a_native_library_that_a_cpu_cannot_use_is_a_warning(
    built: bool, device: str, warned: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.runs.checks.device_of", lambda name: torch.device(device))
    file = tmp_path / "_native.so"
    if built:
        file.touch()
    monkeypatch.setattr(library, "_file", lambda: file)
    monkeypatch.setattr(library, "problem", library.problem.__wrapped__)
    record = execute_run(tiny())[0]
    assert record.status == "ok", record.error
    assert record.execution.kernel == "reference"
    warnings = [text for text in record.warnings if "instead of the native library: built from other sources" in text]
    assert len(warnings) == warned


@pytest.mark.parametrize("name", ["llama3_2_1b", "llama3_8b", "llama3_70b", "mistral_7b", "qwen3_8b"])
def test_real_shapes_with_random_weights_have_the_right_number_of_parameters(name: str) -> None:
    billions = {"llama3_2_1b": 1.24, "llama3_8b": 8.03, "llama3_70b": 70.6, "mistral_7b": 7.24, "qwen3_8b": 8.19}
    cfg = build_run(resolve(f"model={name}_random")).model
    skeleton = models.skeleton(models.open(cfg, 0).shape)
    assert sum(p.numel() for p in skeleton.parameters()) / 1e9 == pytest.approx(billions[name], rel=0.005)
    assert not cfg.scored


@pytest.mark.parametrize(("dtype", "bits"), [("float64", 64), ("float32", 32), ("float16", 16), ("bfloat16", 16)])
def test_float_types_are_rows(tiny: Tiny, dtype: str, bits: int) -> None:
    record = execute_run(tiny("method=none", f"model.dtype={dtype}"))[0]
    assert record.status == "ok", record.error
    assert record.execution.mode == "float"
    assert record.execution.dtype == dtype
    assert record.metrics["bits_per_weight"] == bits
    assert "quantize_s" not in record.metrics
    parameters = sum(p.numel() for p in models.skeleton(models.open(build_run(tiny()).model, 0).shape).parameters())
    assert record.metrics["model_size_mib"] == parameters * bits / 8 / 2**20


def test_runs_repeat_to_the_bit(tiny: Tiny) -> None:
    first, second = (execute_run(tiny("scheme=w8a8_static", "force=true"))[0] for _ in range(2))
    assert first.window_nll == second.window_nll
    assert first.run_id == second.run_id


def test_finished_runs_are_skipped_unless_forced(tiny: Tiny) -> None:
    first, again, forced = (execute_run(tiny(*overrides)) for overrides in ((), (), ("force=true",)))
    assert [skipped for _, skipped in (first, again, forced)] == [False, True, False]
    assert again[0] == first[0]


def test_only_a_setting_that_decides_the_result_changes_the_run_id(tiny: Tiny, tmp_path: Path) -> None:
    def id_of(*overrides: str) -> str:
        raw = tiny(*overrides)
        return run_id_of(raw)

    base = id_of()
    text = tmp_path / "copy.txt"
    text.write_text("some text")
    for ignored in ("force=true", "results_dir=elsewhere", "data.num_samples=9", "data.calibration_source=c4"):
        assert id_of(ignored) == base, ignored
    for deciding in (
        *("bits=3", "seed=1", "scheme=channel", "skip=['*.down_proj']", "model.dtype=bfloat16", "method=none"),
        "kv=kv4_token",
        "data.seq_len=32",
        "data.max_windows=1",
        "data.batch_size=2",
        "execution=simulated",
        f"data.path={text}",
    ):
        assert id_of(deciding) != base, deciding
    assert id_of("method=none", "bits=3", "scheme=channel") == id_of("method=none", "execution=simulated")
    for deciding in ("data.num_samples=9", "data.calibration_source=c4"):
        assert id_of("scheme=w8a8_static", deciding) != id_of("scheme=w8a8_static"), deciding
    before = id_of(f"data.path={text}")
    text.write_text("other text")
    assert id_of(f"data.path={text}") != before


def test_skipped_linears_stay_float_and_count_as_float(tiny: Tiny) -> None:
    record = execute_run(tiny("skip=['*.down_proj']", "bits=8", "scheme=channel"))[0]
    floats = [layer for layer in record.layers if layer["bits_per_weight"] == 32]
    assert [layer["name"] for layer in floats] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert 8.5 < record.metrics["bits_per_weight"] < 32


def test_calibration_text_is_read_only_if_the_run_needs_it(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "e.txt"
    text.write_text("evaluation " * 50)
    evaluation = ("data=text_file", f"data.path={text}")
    assert execute_run(tiny(*evaluation))[0].status == "ok"
    static = execute_run(tiny(*evaluation, "scheme=w8a8_static"))[0]
    assert static.status == "failed"
    assert "data.calibration_path=None; data=text_file has no calibration text" in str(static.error)
    shared = execute_run(tiny(*evaluation, "scheme=w8a8_static", f"data.calibration_path={text}"))[0]
    assert "overlap" in str(shared.error)
    overlapping = ("scheme=w8a8_static", f"data.calibration_path={text}", "data.allow_overlap=true")
    allowed = execute_run(tiny(*evaluation, *overlapping))[0]
    assert allowed.status == "ok"
    assert any("perplexity is too low" in warning for warning in allowed.warnings)
    assert allowed.data.calibration.num_windows == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["scheme.weight.group_size=96"],
            "scheme.weight.group_size=96 does not divide in_features=64 of model.layers.0.self_attn.q_proj; "
            "use a divisor, or -1",
        ),
    ],
)
def test_failures_are_records_and_come_before_the_model(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("the model was loaded"))
    record, _ = execute_run(tiny(*overrides))
    assert (record.status, record.refused) == ("failed", False)
    assert str(record.error).startswith(message)
    assert "\n" not in str(record.error)
    assert store.read(tmp_path / f"{record.run_id}.json") == record


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.seq_len=5000"], "data.seq_len=5000 exceeds the 4096 positions of model=tiny; use 4096 or less"),
        (["skip=['*.gate']"], "skip=*.gate matches no linear; expected a pattern for names such as"),
        (["bits=1"], "scheme.weight.bits=1 is out of range; expected 2 to 8"),
        (["data.path=/nowhere"], "data.path=/nowhere is not a file; expected a text file"),
        (["device=cuda:9"], "device=cuda:9 is not available"),
        (["device=gpu"], "device=gpu is unknown; expected auto, cpu, cuda or cuda:N"),
        (["device=meta"], "device=meta is not supported; expected auto, cpu, cuda or cuda:N"),
        (["save=x", "method=rotate"], "save=x cannot keep the changes that method.rotate makes"),
    ],
)
def test_a_configuration_that_no_run_can_have_leaves_no_record_and_no_folder(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("the model was loaded"))
    record, skipped = execute_run(tiny(*overrides, f"results_dir={tmp_path}/new/runs"))
    assert (record.status, record.refused, skipped) == ("failed", True, False)
    assert str(record.error).startswith(message)
    assert len(str(record.error).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_bug_is_one_line_with_its_class(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "load", lambda *_: {}["gone"])
    record, _ = execute_run(tiny())
    assert record.error == "KeyError: 'gone'; HYDRA_FULL_ERROR=1 shows the traceback"


@pytest.mark.parametrize("message", ["model={}: its blocks are called twice; use rtn", "model={} is unknown"])
def test_the_error_of_a_user_has_200_characters_and_its_remedy(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def refuse(*_args: Any) -> None:
        raise ValueError(message.format("A" * 200))

    monkeypatch.setattr(Source, "load", refuse)
    record = execute_run(tiny())[0]
    assert record.error is not None
    assert len(record.error) == 200
    assert record.error.startswith("model=AAA")
    assert record.error.endswith("...; use rtn" if ";" in message else "A...")


def test_the_record_of_an_early_failure_is_removed_once_the_run_succeeds(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "late.txt"
    raw = tiny(f"data.path={text}", f"results_dir={tmp_path}/runs")
    assert execute_run(raw)[0].status == "failed"
    text.write_text("a text that is long enough for a window " * 20)
    assert execute_run(raw)[0].status == "ok"
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1


def test_a_results_folder_that_cannot_be_written(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record, _ = execute_run(tiny(f"results_dir={tmp_path}/file"))
    assert record.status == "failed"
    assert f"results_dir={tmp_path}/file cannot be written" in str(record.error)
    for missing, reason in ((None, "has type NoneType"), ("", "is not a folder; expected a name such as results/runs")):
        record, _ = execute_run(tiny() | {"results_dir": missing})
        assert reason in str(record.error)


# On the command line.


def test_a_sweep_continues_after_failures_and_skips_finished_runs(tmp_path: Path, command: Command) -> None:
    sizes = "scheme.weight.group_size=32,96"
    output = command("-m", *SWEEP, f"results_dir={tmp_path}", "method=none,rtn", sizes, "scheme=group32")
    assert output.returncode == 1
    assert output.stderr.count("error: ") == 1
    assert "error: tiny rtn group32 bits=4 group_size=96: scheme.weight.group_size=96 does not divide" in output.stderr
    assert "Traceback" not in output.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(record["status"] for record in records) == ["failed", "ok", "ok"]
    assert "| rtn " in output.stdout
    assert "failed" in output.stdout
    again = command("-m", *SWEEP, f"results_dir={tmp_path}", "method=none,rtn", "scheme=group32")
    assert again.returncode == 0
    assert again.stderr.count("skip  tiny") == 2
    assert "1.00x" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=rtm"], "error: method=rtm is unknown; did you mean rtn? expected one of: "),
        (["modle=tiny"], "error: modle=tiny is an unknown key; did you mean model?"),
        (["method=null"], "error: method=null is no name; expected one of: any4, "),
        (["data.seqlen=5"], "error: data.seqlen=5 is an unknown key; did you mean data.seq_len?"),
    ],
)
def test_errors_of_the_command_line_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, command: Command
) -> None:
    output = command(*arguments, f"results_dir={tmp_path}")
    assert output.returncode == 1
    assert len(output.stderr.strip().splitlines()) == 1, output.stderr
    assert output.stderr.startswith(message)


def test_traceback_on_request(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    output = command(*SWEEP, f"results_dir={tmp_path}", "bits=9")
    assert "Traceback" in output.stderr
    assert "error: scheme.weight.bits=9 is out of range; expected 2 to 8" in output.stderr
    with pytest.raises(MissingConfigException):
        command("method=rtm")


def test_a_method_outside_the_repository_works_like_any_other(tmp_path: Path) -> None:
    """The example of CONTRIBUTING.md, run as printed there, in a folder outside this repository.

    A comment in its code changes nothing; other code gives the same run id, another `code`, and a new run.
    """
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    code = guide.split("```python\n", 1)[1].split("```", 1)[0]
    yaml = guide.split("```yaml\n", 1)[1].split("```", 1)[0]
    (tmp_path / "my_methods.py").write_text(code)
    (tmp_path / "conf/method").mkdir(parents=True)
    (tmp_path / "conf/method/clipped.yaml").write_text(yaml)
    arguments = ["--config-dir", "conf", "-m", *SWEEP, "results_dir=runs", "bits=2", "scheme=group32", "isolate=false"]
    output = harness(*arguments, "method=clipped", "method.clipped.shrnk=0.8", cwd=tmp_path)
    assert "error: method.clipped.shrnk=0.8 is an unknown key; did you mean method.clipped.shrink?" in output.stderr
    output = harness(*arguments, "method=clipped", "method.clipped.shrink=0.7,1.0", cwd=tmp_path)
    assert output.returncode == 0, output.stderr
    by_shrink = _by_shrink(tmp_path / "runs")
    first = by_shrink[0.7]
    assert first["metrics"]["bits_per_weight"] == by_shrink[1.0]["metrics"]["bits_per_weight"] == 2 + 18 / 32
    assert first["window_nll"] != by_shrink[1.0]["window_nll"]
    assert first["data"]["calibration"]["num_windows"] == 4
    for old, new, is_skipped in (
        ("shrink: float = 0.9", "shrink: float = 0.9  # a comment", True),
        ("* weight.abs().amax()", "* weight.abs().max() * 0.75", False),
    ):
        assert old in code
        code = code.replace(old, new)
        (tmp_path / "my_methods.py").write_text(code)
        output = harness(*arguments, "method=clipped", "method.clipped.shrink=0.7", cwd=tmp_path)
        assert ("skip  tiny" in output.stderr) == is_skipped, new
    again = _by_shrink(tmp_path / "runs")[0.7]
    assert again["run_id"] == first["run_id"]
    assert again["code"] != first["code"]
    assert again["window_nll"] != first["window_nll"]


def _by_shrink(folder: Path) -> dict[float, dict[str, Any]]:
    """The records of the example in a folder, by the value of its option `shrink`."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {
        record["config"]["method"]["clipped"]["shrink"]: record
        for record in records
        if "clipped" in record["config"]["method"] and record["status"] == "ok"
    }


def test_two_simultaneous_sweeps_into_one_folder_lose_no_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "-m", *SWEEP, f"results_dir={tmp_path}", "isolate=false"]
    axes = ["method=none,rtn", "bits=3,4", "scheme=channel,group32"]
    running = [subprocess.Popen([*command, *axes], cwd=ROOT, stdout=-3, stderr=-3) for _ in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert len(list(tmp_path.glob("*.json"))) == 5
    assert all(store.read(path).status == "ok" for path in tmp_path.glob("*.json"))
    assert list(tmp_path.glob(".*")) == []


def start_and_kill(command: list[str], folder: Path, during_a_run: bool) -> None:
    """Start a sweep, and kill it as soon as it has written a record, or once it has started its next run after that.

    Returns when all its processes have ended.
    """
    records = len(list(folder.glob("*.json")))
    process = subprocess.Popen(command, cwd=ROOT, stdout=-3, stderr=-3)
    until(lambda: len(list(folder.glob("*.json"))) > records or process.poll() is not None)
    if during_a_run:
        earlier = descendants(process)
        until(lambda: descendants(process) - earlier or process.poll() is not None)
    started = descendants(process)
    process.kill()
    process.wait()
    until(lambda: all(map(ended, started)))


def test_a_killed_sweep_leaves_complete_records_and_can_be_continued(tmp_path: Path, command: Command) -> None:
    sweep = ("-m", *SWEEP, f"results_dir={tmp_path}", "bits=2,3,4,5,6")
    for during_a_run in (False, True):
        start_and_kill([sys.executable, "-m", "harness", *sweep], tmp_path, during_a_run)
        for path in tmp_path.glob("*.json"):
            assert store.read(path).status == "ok"
    assert command(*sweep, "isolate=false").returncode == 0
    assert len(list(tmp_path.glob("*.json"))) == 5


def test_only_results_are_written(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = command(*SWEEP, "results_dir=out")
    assert output.returncode == 0, output.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_experiment_lists_its_sweeps(tmp_path: Path, command: Command) -> None:
    """`experiment=bench`, on random weights: the same rows that `make bench` gives."""
    smallest = ("model.architecture.num_hidden_layers=1", "isolate=false")
    output = command("experiment=bench", *SWEEP, *smallest, f"results_dir={tmp_path}")
    assert output.returncode == 0, output.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    rows = {
        ("+".join(r["config"]["method"]), r["config"]["scheme"]["name"], r["config"]["bits"])
        for r in records
        if r["config"]["method"]
    }
    low = {(method, "group64", bits) for method in ("rtn", "gptq", "awq") for bits in (4, 3)}
    eight = {(method, f"w8a8_{kind}", 8) for method in ("rtn", "smoothquant") for kind in ("token", "tensor", "static")}
    int8 = {("llm_int8", "llm_int8", 8), ("bnb_int8", "llm_int8", 8), ("bnb_nf4", "nf4", 4)}
    assert rows == low | eight | int8
    assert {r["execution"]["dtype"] for r in records if not r["config"]["method"]} == {"float32", "bfloat16"}
