"""Checkpoints of bitsandbytes: 4 bits as the library writes and decodes them, 8 bits by their formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import ModelConfig
from harness.core import IntQTensor, LevelsQTensor
from harness.models import open_quantized
from harness.models.exchange.reader import StoredLinear
from tests.support import checkpoints as made

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.floats(tmp_path_factory.mktemp("models") / "float", hidden_size=64, intermediate_size=128)


def read(base: Path, folder: Path, settings: dict[str, Any], encode: Any) -> dict[str, StoredLinear]:
    made.quantized(base, folder, settings | {"quant_method": "bitsandbytes"}, encode)
    source = open_quantized(ModelConfig(name="x", path=str(folder)), 0)
    model = source.load(torch.float32, torch.device("cpu"))
    found = {name: linear for name, linear in source.stored(model) if linear is not None}
    assert set(found) == set(source.reader.linears)
    return found


@pytest.mark.parametrize("table", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_four_bits(base: Path, tmp_path: Path, table: str, nested: bool) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=table)
        expected[name] = functional.dequantize_4bit(packed, state)
        parts = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        return {"weight": packed} | parts

    for name, linear in read(base, tmp_path / "q", {"load_in_4bit": True}, encode).items():
        assert isinstance(linear.weight, LevelsQTensor)
        assert torch.equal(linear.weight.dequantize(), expected[name])
        assert linear.stored_bits > linear.weight.shape[0] * linear.weight.shape[1] * 4
        assert linear.inputs is None


def test_eight_bits(base: Path, tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        absmax = weight.abs().amax(1)
        codes = (weight * (127 / absmax)[:, None]).round().to(torch.int8)
        expected[name] = codes.float() * (absmax / 127)[:, None]
        return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    for name, linear in read(base, tmp_path / "q", {"load_in_8bit": True}, encode).items():
        assert isinstance(linear.weight, IntQTensor)
        assert torch.equal(linear.weight.dequantize(), expected[name])
        assert linear.inputs is not None
        assert linear.inputs.fmt.threshold == 6.0


@pytest.mark.parametrize(
    ("part", "message"),
    [("weight.quant_map", "it has no tensor .*quant_map"), ("weight.absmax", "is no bitsandbytes checkpoint")],
)
def test_a_missing_table_is_one_line(base: Path, tmp_path: Path, part: str, message: str) -> None:
    def encode(name: str, weight: Tensor) -> made.Parts:
        packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
        parts = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        del parts[part]
        return parts

    with pytest.raises(ValueError, match=rf"^model.path=.*{message}"):
        read(base, tmp_path / "q", {"load_in_4bit": True}, encode)
