"""Rows of models that another program quantized: the same figures as a row of the same codes, and refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from harness.config import ModelConfig
from harness.models import open_quantized
from harness.runs import execute_run
from tests.conftest import resolve
from tests.support import checkpoints as made

SHORT = ("data.seq_len=64", "data.max_windows=6", "measure=off", "measure.divergence=true")
GROUP = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float model, and its linears in a GPTQ checkpoint, rounded as scheme group16_sym rounds them."""
    root = tmp_path_factory.mktemp("models")
    base = made.with_tokenizer(made.floats(root / "float", vocab_size=256))

    def encode(name: str, weight: made.Tensor) -> made.Parts:
        return made.gptq(*made.grid(weight, 4, GROUP, True), 4)

    made.quantized(base, root / "gptq4", {"quant_method": "gptq", "bits": 4, "group_size": GROUP}, encode)
    return base, made.with_tokenizer(root / "gptq4")


def row(results: Path, *overrides: str, base: Path | None = None) -> Any:
    raw = resolve(*SHORT, f"results_dir={results}", *overrides)
    if base is not None:
        raw["model"]["base"] = {"name": base.name, "path": str(base)}
    return execute_run(raw)[0]


@pytest.mark.parametrize("execution", ["packed", "simulated"])
def test_a_checkpoint_has_the_figures_of_a_run_with_its_codes(
    folders: tuple[Path, Path], tmp_path: Path, execution: str
) -> None:
    base, quantized = folders
    scheme = ("scheme=group64_sym", f"scheme.weight.group_size={GROUP}", f"execution={execution}")
    ours = row(tmp_path, f"model.path={base}", "method=rtn", *scheme)
    theirs = row(tmp_path, f"model.path={quantized}", "method=checkpoint", f"execution={execution}", base=base)
    assert (ours.status, theirs.status) == ("ok", "ok"), (ours.error, theirs.error)
    assert theirs.window_nll == ours.window_nll
    assert theirs.window_kl == ours.window_kl
    assert theirs.execution.kernel == ours.execution.kernel
    assert theirs.metrics["quantized_share"] == 1.0
    assert theirs.model.fingerprint == ours.model.fingerprint
    assert theirs.model.checkpoint != theirs.model.fingerprint
    assert theirs.model.format == "gptq: int4 group16"
    assert theirs.model.bits == 4
    extra = theirs.metrics["bits_per_weight"] - ours.metrics["bits_per_weight"]
    assert 0 < extra < 2  # zero points and g_idx, which the format stores though they say nothing


def test_without_a_base_there_is_no_divergence(folders: tuple[Path, Path], tmp_path: Path) -> None:
    record = row(tmp_path, f"model.path={folders[1]}", "method=checkpoint")
    assert record.status == "ok", record.error
    assert "perplexity" in record.metrics
    assert "kl" not in record.metrics
    assert record.model.fingerprint == record.model.checkpoint


def test_linears_that_stay_float_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base = folders[0]

    def encode(name: str, weight: made.Tensor) -> made.Parts:
        return {"weight": weight} if "down_proj" in name else made.gptq(*made.grid(weight, 4, GROUP, True), 4)

    made.quantized(base, tmp_path / "q", {"quant_method": "gptq", "bits": 4}, encode)
    record = row(tmp_path / "r", f"model.path={made.with_tokenizer(tmp_path / 'q')}", "method=checkpoint")
    assert record.metrics["quantized_share"] < 1
    assert any("down_proj stays float in the checkpoint" in warning for warning in record.warnings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method=checkpoint",), "is no quantized checkpoint .*use method=none"),
        (("method=checkpoint", "skip=*"), "skip with method=checkpoint: its model is quantized already; remove skip"),
        (("method=checkpoint", "scheme=group64"), "scheme=group64 is another format than that of a checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(
    folders: tuple[Path, Path], tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    record = row(tmp_path, f"model.path={folders['scheme' in str(overrides)]}", *overrides)
    assert record.status == "failed"
    assert record.error is not None
    assert re.search(message, record.error), record.error


def test_random_weights_are_no_quantized_model() -> None:
    with pytest.raises(ValueError, match=r"^model.architecture=.* is no quantized model; use model.path=FOLDER, or"):
        open_quantized(ModelConfig(name="x", architecture={"model_type": "llama"}), 0)


def test_a_base_has_no_use_with_other_methods(folders: tuple[Path, Path], tmp_path: Path) -> None:
    record = row(tmp_path, f"model.path={folders[0]}", "method=rtn", base=folders[0])
    assert "model.base=float has no use with method=rtn" in str(record.error)


@pytest.fixture
def hub(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with the quantized model in two shards as `org/quantized`; returns the files that were downloaded."""
    repository = tmp_path / "hub" / "models--org--quantized"
    snapshot, downloaded = repository / "snapshots" / ("0" * 40), list[str]()
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(folders[1] / "config.json", snapshot)
    published = sharded(folders[1], tmp_path / "published")
    (published / "original").mkdir()
    (published / "original" / "model.safetensors").touch()

    def download(name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: str) -> str:
        assert (name, revision) == ("org/quantized", "main")
        names = [str(file.relative_to(published)) for file in published.rglob("*") if file.is_file()]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            downloaded.append(file)
            shutil.copy(published / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return downloaded


def sharded(folder: Path, target: Path) -> Path:
    """A copy of a folder whose weights are in two files, named by an index; and a file that the index does not name."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2], "consolidated.safetensors": names}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, target / shard, {"format": "pt"})
    (target / "model.safetensors").unlink()
    index = {name: shard for shard, members in list(shards.items())[:2] for name in members}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return target


def test_a_model_of_a_hub_has_the_figures_of_its_folder(
    hub: list[str], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, quantized = folders
    local = row(tmp_path, f"model.path={quantized}", "method=checkpoint", base=base)
    raw = resolve(*SHORT, f"results_dir={tmp_path}", "model.id=org/quantized", "method=checkpoint")
    raw["model"] |= {"name": "q", "package": None, "factor_seed": None, "revision": "main"}
    raw["model"]["base"] = {"name": base.name, "path": str(base)}
    record = execute_run(raw)[0]
    assert record.status == "ok", record.error
    assert record.window_nll == local.window_nll
    assert record.metrics["bits_per_weight"] == local.metrics["bits_per_weight"]
    assert record.model.checkpoint == "org/quantized@main"
    assert record.model.commit == "0" * 40
    files = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"}
    assert set(hub) == files | {"one.safetensors", "two.safetensors"}
