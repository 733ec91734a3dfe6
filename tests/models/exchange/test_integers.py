"""GPTQ and AWQ checkpoints are read to the bit, in every width and order of groups; damaged ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import ModelConfig
from harness.core import IntQTensor
from harness.core.formats import PermutedQTensor
from harness.models import open_quantized
from harness.models.exchange.reader import FileQTensor
from harness.models.quantized import QuantizedSource
from tests.support import checkpoints as made

GROUP = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.floats(tmp_path_factory.mktemp("models") / "float", num_key_value_heads=4)


def source_of(folder: Path) -> QuantizedSource:
    return open_quantized(ModelConfig(name="x", path=str(folder)), 0)


def check_all(folder: Path, expected: dict[str, Tensor], kind: type = IntQTensor) -> QuantizedSource:
    """Every linear decodes to the expected weight, and the model has it under its name."""
    source = source_of(folder)
    assert set(source.reader.linears) == set(expected)
    for name, weight in expected.items():
        linear = source.reader.read(name)
        assert isinstance(linear.weight, kind)
        assert torch.equal(linear.weight.dequantize(), weight), name
    model = source.load(torch.float32, torch.device("cpu"))
    assert [name for name, _ in source.stored(model)] == list(source.reader.linears)
    for name, weight in expected.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), weight)
    return source


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "form"), [(2, "gptq"), (3, "gptq"), (4, "gptq"), (4, "gptq_v2"), (8, "gptq_v2")])
def test_gptq(base: Path, tmp_path: Path, bits: int, form: str, symmetric: bool) -> None:
    section = {"quant_method": "gptq", "bits": bits, "checkpoint_format": form, "group_size": GROUP}
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, zero = made.grid(weight, bits, GROUP, symmetric)
        expected[name] = made.decoded(codes, scale, zero)
        return made.gptq(codes, scale, zero, bits, 2 if form == "gptq_v2" else 1)

    made.quantized(base, tmp_path / "q", section, encode)
    source = check_all(tmp_path / "q", expected)
    name = next(iter(expected))
    linear, (rows, columns) = source.reader.read(name), expected[name].shape
    assert isinstance(linear.weight, IntQTensor)
    assert linear.weight.fmt.symmetric == symmetric
    assert linear.weight.fmt.group_size == GROUP
    groups = rows * columns // GROUP
    assert linear.stored_bits == rows * columns * bits + groups * (16 + bits) + 32 * columns  # with g_idx


def test_a_zero_point_of_0_survives_version_1(base: Path, tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, zero = made.grid(weight.abs(), 4, GROUP, False)
        assert not zero.any()
        expected[name] = made.decoded(codes, scale, zero)
        return made.gptq(codes, scale, zero, 4)

    made.quantized(base, tmp_path / "q", {"quant_method": "gptq", "bits": 4}, encode)
    check_all(tmp_path / "q", expected)


@pytest.mark.parametrize("equal", [True, False])
def test_groups_in_any_order(base: Path, tmp_path: Path, equal: bool) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, zero = made.grid(weight, 4, GROUP, False)
        group = (torch.arange(weight.shape[1]) // GROUP)[torch.randperm(weight.shape[1])]
        if not equal:
            group[group == 1] = 0
        expected[name] = made.decoded(codes, scale, zero, group)
        return made.gptq(codes, scale, zero, 4) | {"g_idx": group.int()}

    made.quantized(base, tmp_path / "q", {"quant_method": "gptq", "bits": 4, "desc_act": True}, encode)
    check_all(tmp_path / "q", expected, PermutedQTensor if equal else FileQTensor)


GPTQMODEL = {"quant_method": "gptq", "dynamic": {r"+:.*down_proj": {"bits": 8}, r"-:.*lm_head": {}}}
NAMED = {f"model.layers.{i}.mlp.down_proj": {"bits": 8} for i in range(2)}
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
AUTO_ROUND_NAMES = AUTO_ROUND | {"extra_config": {r".*mlp\.down_proj.*": {"bits": 3}, **NAMED}}
AUTO_ROUND_PATTERN = AUTO_ROUND | {"extra_config": {r".*mlp\.down_proj.*": {"bits": 8}, "lm_head": {"bits": 16}}}


@pytest.mark.parametrize("settings", [GPTQMODEL, AUTO_ROUND_NAMES, AUTO_ROUND_PATTERN])
def test_linears_of_another_width(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    section = settings | {"bits": 4}
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        bits = 8 if "down_proj" in name else 4
        codes, scale, zero = made.grid(weight, bits, GROUP, True)
        expected[name] = made.decoded(codes, scale, zero)
        return made.gptq(codes, scale, zero, bits)

    made.quantized(base, tmp_path / "q", section, encode)
    check_all(tmp_path / "q", expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(base: Path, tmp_path: Path, symmetric: bool) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, zero = made.grid(weight, 4, GROUP, symmetric)
        expected[name] = made.decoded(codes, scale, zero)
        return made.awq(codes, scale, zero)

    made.quantized(base, tmp_path / "q", {"quant_method": "awq", "bits": 4, "version": "gemm"}, encode)
    check_all(tmp_path / "q", expected)


def encode_gptq(name: str, weight: Tensor) -> made.Parts:
    return made.gptq(*made.grid(weight, 4, GROUP, False), 4)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"bits": 5}, r"has a format without a reader \(bits=5 in its quantization section, expected 2, 3, 4, 8\)"),
    ({"checkpoint_format": "marlin"}, r"has a format without a reader \(checkpoint_format=marlin"),
    (
        {"quant_method": "quark"},
        r"has a format without a reader \(quant_method=quark .*expected one of: ptqbench, gptq",
    ),
    ({"bits": 8}, r"cannot be read \(.*g_idx is int32 64, expected int32 or int64 32\)"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_settings_that_do_not_fit_are_one_line(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    section = {"quant_method": "gptq", "bits": 4} | change
    made.quantized(base, tmp_path / "q", section, encode_gptq)
    with pytest.raises(ValueError, match=rf"^model.path=.*{message}"):
        source_of(tmp_path / "q").load(torch.float32, torch.device("cpu"))
