"""Checkpoints of gpt-oss: experts decode to the bits of transformers' function, and bits are those of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from harness.core import FloatQTensor
from harness.runs import execute_run
from tests.conftest import resolve
from tests.models.exchange.test_integers import source_of
from tests.support import checkpoints as made

EXPERTS, SIDE = 4, 64  # down_proj is square, so that its shape does not tell how it is stored
CPU = torch.device("cpu")


def save_float(folder: Path) -> None:
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=256,
        hidden_size=SIDE,
        intermediate_size=SIDE,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        sliding_window=32,
        pad_token_id=0,
        dtype="bfloat16",
    )
    AutoModelForCausalLM.from_config(shape).bfloat16().save_pretrained(folder)
    made.with_tokenizer(folder)


def save_mxfp4(base: Path, folder: Path, chance: torch.Generator) -> dict[str, Tensor]:
    """Write the model of `base` with random codes and exponents for its experts; returns what transformers decodes."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=chance, dtype=torch.uint8)
        scales = torch.randint(118, 124, blocks.shape[:3], generator=chance, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    made.with_tokenizer(folder)
    return expected


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Tensor]]:
    root = tmp_path_factory.mktemp("models")
    save_float(root / "float")
    expected = save_mxfp4(root / "float", root / "mxfp4", torch.Generator().manual_seed(1))
    return root / "float", root / "mxfp4", expected


Folders = tuple[Path, Path, dict[str, Tensor]]


def test_experts_decode_as_in_transformers(folders: Folders) -> None:
    _, folder, expected = folders
    source = source_of(folder)
    model = source.load(torch.bfloat16, CPU)
    assert set(source.reader.linears) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(name), weight), name
    for name, linear in source.stored(model):
        assert linear is not None
        assert isinstance(linear.weight, FloatQTensor)
        assert linear.experts == EXPERTS
        assert linear.weight.shape == (expected[name].shape[0] * expected[name].shape[2], expected[name].shape[1])
        assert linear.stored_bits == expected[name].numel() * 4 + expected[name].numel() // 32 * 8


def test_the_model_is_that_of_transformers(folders: Folders) -> None:
    _, folder, _ = folders
    tokens = torch.arange(24).view(1, -1)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ours = source_of(folder).load(torch.bfloat16, CPU)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("execution", ["packed", "simulated"])
def test_bits_of_a_row_are_those_of_the_file(folders: Folders, tmp_path: Path, execution: str) -> None:
    base, folder, expected = folders
    raw = resolve(
        f"model.path={folder}",
        "method=checkpoint",
        f"execution={execution}",
        f"results_dir={tmp_path}",
        "data.seq_len=32",
        "data.max_windows=2",
        "measure=off",
        "measure.divergence=true",
    )
    raw["model"]["base"] = {"name": "float", "path": str(base)}
    record, _ = execute_run(raw)
    assert record.status == "ok", record.error
    experts = sum(weight.numel() for weight in expected.values())
    floats = sum(tensor.numel() for name, tensor in load_file(base / "model.safetensors").items() if in_block(name))
    floats -= experts
    bits = experts * (4 + 8 / 32) + floats * 16
    assert record.metrics["bits_per_weight"] == pytest.approx(bits / (experts + floats), rel=1e-12)
    assert record.metrics["quantized_share"] == pytest.approx(experts / (experts + floats), rel=1e-12)
    assert record.metrics["model_size_mib"] * 2**20 == (folder / "model.safetensors").stat().st_size - header(folder)
    assert record.metrics["kl"] > 0
    assert record.model.format == "mxfp4: e2m1 group32"
    decoded = [warning for warning in record.warnings if "is decoded: it has the experts" in warning]
    assert len(decoded) == 2


def in_block(name: str) -> bool:
    """Whether a tensor is a matrix of a block; biases of experts are matrices too."""
    return ".layers." in name and (name.endswith(("proj.weight", "router.weight")) or ".experts." in name)


def header(folder: Path) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[..., :-1], "gate_up_proj_scales is uint8 4x128x1, expected uint8"),
        (lambda tensor: tensor.to(torch.int32), "gate_up_proj_scales is int32"),
        (lambda tensor: torch.full_like(tensor, 255), "gate_up_proj has scales that are NaN or infinite"),
    ],
)
def test_damaged_scales_are_one_line(folders: Folders, tmp_path: Path, change: object, message: str) -> None:
    tensors = load_file(folders[1] / "model.safetensors")
    name = next(name for name in tensors if name.endswith("gate_up_proj_scales"))
    tensors[name] = change(tensors[name]).contiguous()  # type: ignore[operator]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folders[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"^model.path=.*{message}"):
        source_of(tmp_path).load(torch.float32, CPU)
