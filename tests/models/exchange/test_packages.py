"""Checkpoints of HQQ, optimum-quanto and torchao: what each linear becomes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.core import FloatQTensor, IntQTensor
from harness.core.formats import OffsetQTensor
from harness.models.exchange.labels import label_of
from harness.models.exchange.reader import FileQTensor
from tests.models.exchange.test_integers import source_of
from tests.models.exchange.test_libraries import DATA

CPU = torch.device("cpu")
BLOCK = "model.layers.0."
Change = Callable[[dict[str, Tensor]], None]


FORMATS = [
    ("hqq", "self_attn.q_proj", IntQTensor, "int8 group16", 64 * (16 * 8 + 32 + 32)),
    ("hqq", "self_attn.v_proj", IntQTensor, "int3 group16", 4 * 16 * 32 + 32 * (32 + 32)),
    ("hqq", "mlp.down_proj", IntQTensor, "int2 group16", 128 * (16 * 2 + 32 + 32)),
    ("hqq", "mlp.gate_proj", FileQTensor, "int1 group16", 128 * (16 + 32 + 32)),
    ("hqq_without", "self_attn.k_proj", FileQTensor, "int4 group16 axis0", 32 * (16 * 4 + 16 + 16)),
    ("hqq_without", "mlp.up_proj", FileQTensor, "int4 group64", 32 * (64 * 4 + 16 + 16)),
    ("quanto", "self_attn.v_proj", OffsetQTensor, "int4 group16", 8 * (16 * 4 + 32 + 32)),
    ("quanto", "mlp.down_proj", OffsetQTensor, "int4 group32", 16 * 5 * (32 * 4 + 32 + 32)),
    ("quanto", "self_attn.q_proj", IntQTensor, "int8 channel", 16 * (16 * 8 + 32)),
    ("quanto", "mlp.gate_proj", FloatQTensor, "e5m2 channel", 160 * (16 * 8 + 32)),
    ("torchao", "self_attn.k_proj", IntQTensor, "int8 group16", 32 * (16 * 8 + 32 + 8)),
    ("torchao", "mlp.down_proj", IntQTensor, "int3 group32", 64 * (32 * 8 + 16 + 8)),
    ("torchao_blocks", "self_attn.q_proj", FloatQTensor, "e2m1 group32", 32 * (32 * 4 + 8)),
    ("torchao_blocks", "mlp.up_proj", FloatQTensor, "e4m3 group32", 160 * 32 * 8 + 2 * 128 * 4 * 8),  # in two tiles
    ("torchao_blocks", "mlp.down_proj", FloatQTensor, "e2m1 group16", 32 * 160 * 4 + 3 * 128 * 4 * 8 + 32),
]


@pytest.mark.parametrize(("folder", "linear", "kind", "label", "bits"), FORMATS)
def test_formats_and_bits(folder: str, linear: str, kind: type, label: str, bits: int) -> None:
    stored = source_of(DATA / folder).reader.read(BLOCK + linear)
    assert isinstance(stored.weight, kind)
    assert label_of(stored.weight) == label
    settings = stored.stored_bits - bits  # of hqq, which has a tensor for each of its settings
    assert (0 < settings < 1200) if "hqq" in folder else settings == 0


def changed(name: str, folder: Path, change: Change) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(DATA / name, folder)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, header)
    return folder


def put(part: str, of: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[BLOCK + part] = of(tensors[BLOCK + part])

    return change


def text(characters: str) -> Tensor:
    return torch.tensor(list(characters.encode()), dtype=torch.uint8)


BROKEN = [
    ("hqq", put("mlp.up_proj.quant_zero", torch.ones_like), "quant_zero=1 .*expected 0"),
    ("hqq", put("mlp.up_proj.packing", lambda _: text("5bit_u8")), "packing=5bit_u8 .*expected 8bit_u8"),
    ("hqq", put("mlp.up_proj.group_size", lambda old: old + 1), "group_size=17 and axis=1 for a weight 64x32"),
    ("hqq", put("mlp.up_proj.W_q", lambda old: old | 64), "mlp.up_proj has a code beyond 6 bits"),
    ("hqq", put("mlp.up_proj.scale", lambda old: old / 0), "mlp.up_proj has scales that are NaN"),
    ("hqq", put("mlp.up_proj.zero", lambda old: old.half()), "up_proj.zero is float16 128x1"),
    ("hqq", put("mlp.up_proj.shape", lambda old: -old), "up_proj.shape is -64x-32"),
    ("hqq", lambda tensors: tensors.pop(f"{BLOCK}mlp.up_proj.scale"), "it has no tensor .*up_proj.scale"),
    ("quanto", put("self_attn.v_proj.weight._scale", lambda old: old[2:]), "v_proj.weight._data._data is uint8 4x16"),
    ("quanto", put("mlp.down_proj.weight._shift", lambda old: old[1:]), "down_proj.weight._shift is float32 79x1"),
    ("torchao", put("mlp.down_proj._weight_qdata", lambda old: old + 8), "down_proj.weight has a code beyond 3 bits"),
    ("torchao", put("mlp.down_proj._weight_zero_point", lambda old: old[1:]), "weight.zero_point is int8 31x2"),
    ("torchao_blocks", put("mlp.up_proj._weight_scale", lambda old: old[1:]), "1008 values, which are no 2x1 tiles"),
    ("torchao_blocks", put("self_attn.q_proj._weight_scale", lambda old: old[1:]), "is float8_e8m0fnu 31x1"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_parts_that_do_not_fit_are_one_line(name: str, change: Change, message: str, tmp_path: Path) -> None:
    source = source_of(changed(name, tmp_path / name, change))
    with pytest.raises(ValueError, match=rf"^model.path=.*{message}"):
        source.load(torch.float32, CPU)


def test_a_pickle_of_hqq_is_refused(tmp_path: Path) -> None:
    shutil.copy(DATA / "hqq_without" / "config.json", tmp_path)
    torch.save({}, tmp_path / "qmodel.pt")
    with pytest.raises(ValueError, match=r"qmodel.pt is a pickle of hqq.*save_to_safetensors"):
        source_of(tmp_path).check()


def test_a_pickle_of_torchao_is_refused(tmp_path: Path) -> None:
    shutil.copy(DATA / "torchao" / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle of torchao.*save it as safetensors"):
        source_of(tmp_path).check()


def test_an_integer_shift_of_quanto_is_a_zero_point(tmp_path: Path) -> None:
    name = f"{BLOCK}self_attn.v_proj"

    def change(tensors: dict[str, Tensor]) -> None:
        shift = tensors[f"{name}.weight._shift"]
        tensors[f"{name}.weight._shift"] = (torch.arange(len(shift)).view_as(shift) % 16).to(torch.int8)

    folder = changed("quanto", tmp_path / "q", change)
    tensors = load_file(folder / "model.safetensors")
    packed, scale, shift = (tensors[f"{name}.weight.{part}"] for part in ("_data._data", "_scale", "_shift"))
    codes = torch.cat([packed & 15, packed >> 4]).to(torch.int8)
    weight = source_of(folder).reader.read(name).weight
    assert isinstance(weight, IntQTensor)
    assert torch.equal(weight.dequantize(), scale * (codes - shift))


def test_quantized_outputs_of_quanto_are_a_warning() -> None:
    warnings: list[str] = []
    source_of(DATA / "quanto").load(torch.float32, CPU, warnings.append)
    assert warnings == ["model=quanto: its quantized outputs are not applied"]


def described(folder: Path, name: str, kind: str, attributes: dict[str, Any], parts: dict[str, Tensor]) -> Path:
    """A copy of the checkpoint of torchao in which the weight of a linear is of another class."""
    shutil.copytree(DATA / "torchao", folder)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:  # type: ignore[no-untyped-call]
        header = opened.metadata()
    tensors = load_file(file)
    for key in [key for key in tensors if key.startswith(f"{name}._weight_")]:
        del tensors[key]
    tensors |= {f"{name}._weight_{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, file, header | {f"{name}.weight": json.dumps({"_type": kind, "_data": attributes})})
    return folder


def test_int4_of_torchao(tmp_path: Path) -> None:
    """Its kernels run on GPUs alone: codes and scales are written value by value."""
    name, (rows, columns, size) = f"{BLOCK}mlp.up_proj", (64, 32, 16)
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale, middle = (torch.rand(columns // size, rows) + 0.5).bfloat16(), torch.randn(columns // size, rows).bfloat16()
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    attributes = {"block_size": [1, size], "shape": [rows, columns]}
    attributes["activation_dtype"] = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
    parts = {"qdata": packed, "scale": scale, "zero_point": middle}
    linear = source_of(described(tmp_path / "q", name, "Int4Tensor", attributes, parts)).reader.read(name)
    spread = [tensor.t().float().repeat_interleave(size, 1) for tensor in (scale, middle)]
    assert isinstance(linear.weight, OffsetQTensor)
    torch.testing.assert_close(linear.weight.dequantize(), codes * spread[0] + spread[1], rtol=0, atol=2e-6)
    assert linear.stored_bits == rows * columns * 4 + rows * columns // size * 32
    assert linear.inputs is not None


def test_other_classes_of_torchao_are_refused(tmp_path: Path) -> None:
    name = f"{BLOCK}mlp.up_proj"
    parts = {"qdata": torch.zeros(1, dtype=torch.int32), "scale_and_zero": torch.zeros(1)}
    folder = described(tmp_path / "q", name, "Int4TilePackedTo4dTensor", {}, parts)
    with pytest.raises(ValueError, match=r"_type=Int4TilePackedTo4dTensor .*expected Int8Tensor"):
        source_of(folder).load(torch.float32, CPU)


def test_names_of_torchao_before_version_0_15(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("._weight_", ".weight:") if "._weight_" in name else f"{name}:_data"
            tensors[old] = tensors.pop(name)

    source = source_of(changed("torchao", tmp_path / "q", rename))
    model = source.load(torch.float32, CPU)
    for name, weight in load_file(DATA / "torchao" / "expected.safetensors").items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), weight)
