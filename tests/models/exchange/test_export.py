"""Exported folders: read again to the bit, in every format that holds a scheme; others are refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.runs import execute_run
from tests.conftest import resolve
from tests.models.exchange.test_integers import source_of
from tests.support import checkpoints as made

SHORT = ("data.seq_len=64", "data.max_windows=6", "data.num_samples=4", "data.calibration_seq_len=32", "measure=off")
G16 = ("scheme=group64", "scheme.weight.group_size=16")
FULL = "scheme.activation.grid=full"
ASYMMETRIC = (
    FULL,
    "scheme.activation.symmetric=false",
    "scheme.weight.symmetric=false",
    "scheme.weight.grid=full",
)

HELD = [
    ("native", ("method=gptq", *G16, "bits=4")),
    ("native", ("method=gptq", *G16, "bits=4", "method.gptq.act_order=true", "method.gptq.static_groups=false")),
    ("native", ("method=rtn", "scheme=w8a8_static")),
    ("native", ("method=rtn", "scheme=nvfp4")),
    ("native", ("method=rtn", "scheme=nf4")),
    ("native", ("method=rtn", "scheme=learned", "bits=3")),
    ("native", ("method=rtn", "scheme=learned_group64", "scheme.weight.group_size=16", "bits=3")),
    ("native", ("method=quip_sharp", "bits=2")),
    ("native", ("method=aqlm", "method.aqlm.iterations=1", "method.aqlm.epochs=0", "method.aqlm.code_bits=4")),
    ("native", ("method=llm_int8", "method.llm_int8.outlier_weights=float16", "scheme.activation.threshold=1.0")),
    ("gptq", ("method=rtn", *G16, "bits=4")),
    ("gptq", ("method=rtn", *G16, "bits=3")),
    ("gptq", ("method=gptq", *G16, "bits=4", "method.gptq.act_order=true", "method.gptq.static_groups=false")),
    ("gptq", ("method=rtn", "scheme=channel_sym", "bits=8")),
    ("awq", ("method=rtn", *G16, "bits=4")),
    ("compressed-tensors", ("method=rtn", *G16, "bits=4")),
    ("compressed-tensors", ("method=rtn", *G16, "bits=3")),
    ("compressed-tensors", ("method=rtn", "scheme=channel_sym", "bits=8")),
    ("compressed-tensors", ("method=rtn", "scheme=w8a8_token", FULL)),
    ("compressed-tensors", ("method=rtn", "scheme=w8a8_token", *ASYMMETRIC)),
    ("compressed-tensors", ("method=rtn", "scheme=w8a8_static")),
    ("compressed-tensors", ("method=rtn", "scheme=w8a8_static", *ASYMMETRIC)),
    ("compressed-tensors", ("method=rtn", "scheme=w4a8_token", "scheme.weight.group_size=16", FULL)),
    ("compressed-tensors", ("method=rtn", "scheme=fp8_static")),
    ("compressed-tensors", ("method=rtn", "scheme=w_fp8_channel")),
    ("compressed-tensors", ("method=rtn", "scheme=fp8_channel")),
    ("compressed-tensors", ("method=rtn", "scheme=fp8_block")),
    ("compressed-tensors", ("method=rtn", "scheme=w_nvfp4")),
    ("compressed-tensors", ("method=rtn", "scheme=w_mxfp4")),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"vocab_size": 256, "num_key_value_heads": 4}
    return made.with_tokenizer(made.floats(tmp_path_factory.mktemp("models") / "float", **options))


@pytest.mark.parametrize(("form", "overrides"), HELD)
def test_an_exported_model_is_a_checkpoint_with_the_same_figures(
    base: Path, tmp_path: Path, form: str, overrides: tuple[str, ...]
) -> None:
    saved = tmp_path / "saved"
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", "execution=simulated")
    ours, _ = execute_run(resolve(*common, f"model.path={base}", *overrides, f"save={saved}", f"export={form}"))
    assert (ours.status, ours.unsaved) == ("ok", None), (ours.error, ours.unsaved)
    theirs, _ = execute_run(resolve(*common, f"model.path={saved}", "method=checkpoint"))
    assert theirs.status == "ok", theirs.error
    if "w_nvfp4" in str(overrides):  # the scale of the tensor is stored as its reciprocal
        assert theirs.window_nll == pytest.approx(ours.window_nll, rel=1e-6)
    else:
        assert theirs.window_nll == ours.window_nll
    assert {path.name for path in saved.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    if form == "gptq":  # loaders take groups as consecutive where this is false
        section = json.loads((saved / "config.json").read_text())["quantization_config"]
        assert section["desc_act"] == ("method.gptq.act_order=true" in overrides)
    assert list(tmp_path.glob("saved.part-*")) == []


def test_a_width_for_each_linear_is_saved(base: Path, tmp_path: Path) -> None:
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}", "method=rtn", *G16)
    ranked, _ = execute_run(resolve(*common, "analysis.sensitivity=linear", "analysis.windows=1", "bits=3"))
    assert ranked.status == "ok", ranked.error
    mixed = ("mixed.budget=5", "mixed.widths=[2,3,4,5]", f"mixed.sensitivity={tmp_path / 'r'}", "execution=simulated")
    ours, _ = execute_run(resolve(*common, *mixed, f"save={tmp_path / 'saved'}"))
    assert (ours.status, ours.unsaved) == ("ok", None), (ours.error, ours.unsaved)
    options = (f"results_dir={tmp_path / 'r'}", "execution=simulated", "method=checkpoint")
    theirs, _ = execute_run(resolve(*SHORT, *options, f"model.path={tmp_path / 'saved'}"))
    assert theirs.window_nll == ours.window_nll
    assert theirs.metrics["bits_per_weight"] == ours.metrics["bits_per_weight"]
    compressed = ("export=compressed-tensors", "force=true", f"save={tmp_path / 'compressed'}")
    again, _ = execute_run(resolve(*common, *mixed, *compressed))
    assert (again.status, again.unsaved) == ("ok", None), (again.error, again.unsaved)
    theirs, _ = execute_run(resolve(*SHORT, *options, f"model.path={tmp_path / 'compressed'}"))
    assert theirs.window_nll == ours.window_nll
    section = json.loads((tmp_path / "compressed/config.json").read_text())["quantization_config"]
    widths = {row["bits"] for row in ours.layers}
    assert {group["weights"]["num_bits"] for group in section["config_groups"].values()} == widths
    assert len(widths) > 1
    refused, _ = execute_run(resolve(*common, *mixed, f"save={tmp_path / 'other'}", "export=gptq"))
    assert "export=gptq with mixed.budget=5: the file has one width" in str(refused.error)


def test_groups_in_the_order_of_activations_are_not_saved(base: Path, tmp_path: Path) -> None:
    """compressed-tensors 0.20 reads no `g_idx`: such a file would be another model there."""
    order = ("method=gptq", *G16, "method.gptq.act_order=true", "method.gptq.static_groups=false")
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}")
    record, _ = execute_run(resolve(*common, *order, f"save={tmp_path / 'saved'}", "export=compressed-tensors"))
    assert record.status == "ok"
    assert "cannot hold the weight=PermutedQTensor; expected integers" in str(record.unsaved)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("form", "overrides", "message"),
    [
        ("gptq", ("scheme=group64", "bits=5"), "export=gptq cannot hold bits=5; expected 2, 3, 4, 8, or export=native"),
        ("awq", ("scheme=group64", "bits=3"), "export=awq cannot hold bits=3; expected 4"),
        ("gptq", ("scheme=w_mxfp4",), "export=gptq cannot hold scheme=w_mxfp4; expected an integer grid"),
        ("awq", ("scheme=w8a8_token",), "export=awq cannot hold scheme=w8a8_token; expected a scheme without activat"),
        (
            "compressed-tensors",
            ("scheme=nf4",),
            "export=compressed-tensors cannot hold scheme=nf4; expected integers or",
        ),
        ("compressed-tensors", ("scheme=w_mxfp6",), "cannot hold scheme=w_mxfp6; expected FP8 per tensor"),
        (
            "compressed-tensors",
            ("scheme=w4afp8",),
            "cannot hold scheme=w4afp8; expected integers or small floats, with",
        ),
        ("compressed-tensors", ("scheme=w8a8_token",), "cannot hold scheme.activation.grid=narrow; expected full, or"),
        ("compressed-tensors", ("scheme=w4a4_token", FULL), "hold scheme.activation.bits=4; expected 8, or"),
        ("compressed-tensors", ("scheme=w8a8_tensor", FULL), "hold scheme.activation.granularity=tensor; expected tok"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_computed(
    base: Path, tmp_path: Path, form: str, overrides: tuple[str, ...], message: str
) -> None:
    raw = resolve(*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}", "method=rtn", *overrides)
    raw |= {"save": str(tmp_path / "saved"), "export": form}
    record, _ = execute_run(raw)
    assert record.status == "failed"
    assert message in str(record.error)
    assert record.stages == {}
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("scheme", "form"), [("group64", "gptq_v2"), ("group64_sym", "gptq")])
def test_a_zero_point_of_0_needs_version_2(base: Path, tmp_path: Path, scheme: str, form: str) -> None:
    """With 2 bits, some groups of an asymmetric grid have it."""
    settings = (f"scheme={scheme}", "scheme.weight.group_size=4", "bits=2", "method=rtn", "export=gptq")
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}")
    record, _ = execute_run(resolve(*common, *settings, f"save={tmp_path / 'saved'}"))
    assert record.unsaved is None, record.unsaved
    section = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert section["checkpoint_format"] == form


def test_transformers_names_what_the_folder_is(base: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    common = (*SHORT, f"results_dir={tmp_path / 'r'}", f"model.path={base}", "method=rtn", *G16)
    record, _ = execute_run(resolve(*common, f"save={saved}", "export=compressed-tensors"))
    assert record.unsaved is None
    section = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert section["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert section["ignore"] == ["lm_head"]
    source = source_of(saved)
    model = source.load(torch.float32, torch.device("cpu"))
    assert all(linear is not None for _, linear in source.stored(model))
