"""Checkpoints that are quantized already are refused before a weight is loaded, and the line says what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import models
from harness.config import ModelConfig
from harness.utils.errors import LIMIT
from tests.support.families import build as build_family

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_family("llama").save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    return tmp_path / "saved"


def refused(folder: Path) -> str:
    """What the line says that the checkpoint is."""
    with pytest.raises(ValueError, match=r"^model.path=.*saved is quantized already \(.*\); expected float") as caught:
        models.open(ModelConfig(name="x", path=str(folder)), 0).check()
    line = str(caught.value)
    assert len(line) <= LIMIT
    return line[line.index("(") + 1 : line.index("); expected")]


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes, 8 bits"),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": False}}, "bitsandbytes, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "never heard of"}}, "never heard of"),
        (
            {
                "compression_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"0": {"weights": {"num_bits": 3}}},
                }
            },
            "compressed-tensors, 3 bits",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "awq", "bits": 4}}}, "awq, 4 bits"),
        ({"dtype": "float8_e4m3fn"}, "dtype=float8_e4m3fn"),
        ({"torch_dtype": "int8", "dtype": None}, "dtype=int8"),
    ],
)
def test_what_config_json_says(folder: Path, section: dict[str, Any], kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | section))
    assert kind in refused(folder)


def test_an_empty_section_is_a_float_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    models.open(ModelConfig(name="x", path=str(folder)), 0).check()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("quantize_config.json", {"bits": 4}, "GPTQ or AWQ, 4 bits, by quantize_config.json"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "ModelOpt"),
    ],
)
def test_what_files_beside_it_say(folder: Path, name: str, content: dict[str, Any], kind: str) -> None:
    (folder / name).write_text(json.dumps(content))
    assert kind in refused(folder)
    (folder / "config.json").unlink()
    assert kind in refused(folder)


def test_a_folder_with_only_gguf(folder: Path) -> None:
    (folder / "model.q4_0.gguf").write_bytes(b"GGUF")
    models.open(ModelConfig(name="x", path=str(folder)), 0).check()
    (folder / "model.safetensors").unlink()
    assert refused(folder) == "GGUF: model.q4_0.gguf"
    (folder / "config.json").unlink()
    assert refused(folder) == "GGUF: model.q4_0.gguf"


def codes(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"].to(dtype)})


@pytest.mark.parametrize("torch_format", [False, True])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (codes(torch.int8), f"by {UP}.weight"),
        (codes(torch.uint8), f"by {UP}.weight"),
        (codes(torch.float8_e4m3fn), f"by {UP}.weight"),
        (lambda tensors: tensors.update({f"{UP}.qweight": tensors.pop(f"{UP}.weight")}), "GPTQ or AWQ"),
        (lambda tensors: tensors.update({f"{UP}.SCB": torch.ones(3)}), "bitsandbytes, 8 bits"),
        (lambda tensors: tensors.update({f"{UP}.weight.absmax": torch.ones(3)}), "bitsandbytes, 4 bits"),
        (lambda tensors: tensors.update({f"{UP}.weight_packed": torch.ones(3)}), "compressed-tensors"),
        (lambda tensors: tensors.update({f"{UP}.weight_scale_inv": torch.ones(3)}), "FP8 in blocks"),
    ],
)
def test_what_the_tensors_say(folder: Path, change: Callable[..., object], kind: str, torch_format: bool) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    file.unlink()
    if torch_format:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    assert kind in refused(folder)


def test_integer_buffers_are_no_codes(folder: Path) -> None:
    file = folder / "model.safetensors"
    buffers = {"model.layers.0.attn.bias": torch.ones(2, 2, dtype=torch.uint8), "model.position_ids": torch.arange(4)}
    save_file({**load_file(file), **buffers}, file, metadata={"format": "pt"})
    models.open(ModelConfig(name="x", path=str(folder)), 0).check()
