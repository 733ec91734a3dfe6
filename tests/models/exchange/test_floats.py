"""Checkpoints of compressed-tensors, ModelOpt and DeepSeek's blocks are read to the bit, with their inputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import ModelConfig
from harness.core import FloatQTensor, IntQTensor
from harness.core.formats import InputQuantizer
from harness.models import open_quantized
from harness.models.checkpoint import CheckpointError
from harness.models.exchange.inputs import FixedTensorScale
from harness.models.exchange.reader import StoredLinear
from tests.support import checkpoints as made

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.floats(tmp_path_factory.mktemp("models") / "float")


def section(weights: dict[str, Any], inputs: dict[str, Any] | None = None, form: str = "") -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def read(base: Path, folder: Path, settings: dict[str, Any], encode: Any) -> dict[str, StoredLinear]:
    """All linears of a checkpoint, after the model was loaded and every linear was found in it."""
    made.quantized(base, folder, settings, encode)
    source = open_quantized(ModelConfig(name="x", path=str(folder)), 0)
    model = source.load(torch.float32, torch.device("cpu"))
    found = {name: linear for name, linear in source.stored(model) if linear is not None}
    assert set(found) == set(source.reader.linears)
    return found


def to_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-448, 448).to(E4M3)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fp8_of_compressed_tensors(base: Path, tmp_path: Path, granularity: str) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        absmax = weight.abs().amax() if granularity == "tensor" else weight.abs().amax(1, keepdim=True)
        scale = (absmax / 448).bfloat16()
        codes = to_fp8(weight, scale.float())
        expected[name] = codes.float() * scale.float()
        return {"weight": codes, "weight_scale": scale.reshape(1) if granularity == "tensor" else scale}

    weights = {"num_bits": 8, "type": "float", "strategy": granularity, "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    found = read(base, tmp_path / "q", section(weights, inputs), encode)
    for name, linear in found.items():
        assert isinstance(linear.weight, FloatQTensor)
        assert linear.weight.fmt.granularity == granularity
        assert torch.equal(linear.weight.dequantize(), expected[name])
        assert linear.inputs is not None
    x = torch.randn(3, expected[name].shape[1])
    scale = x.abs().amax(1, keepdim=True) / 448
    assert isinstance(linear.inputs, InputQuantizer)
    assert torch.equal(linear.inputs(x), (x / scale).to(E4M3).float() * scale)


def test_calibrated_inputs(base: Path, tmp_path: Path) -> None:
    def encode(name: str, weight: Tensor) -> made.Parts:
        scale = weight.abs().amax() / 448
        return {
            "weight": to_fp8(weight, scale),
            "weight_scale": scale.reshape(1),
            "input_scale": torch.tensor([0.01]),
        }

    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    linear = next(iter(read(base, tmp_path / "q", section(weights, inputs), encode).values()))
    x = torch.linspace(-6, 6, 64).view(1, 64)
    assert linear.inputs is not None
    assert torch.equal(linear.inputs(x), (x / torch.tensor(0.01)).clamp(-448, 448).to(E4M3).float() * 0.01)
    assert linear.stored_bits == 8 * linear.weight.shape[0] * linear.weight.shape[1] + 32  # without that of inputs


def test_blocks(base: Path, tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        rows, columns = weight.shape
        scale = torch.rand(-(-rows // 24), -(-columns // 24)) + 0.5
        spread = scale.repeat_interleave(24, 0)[:rows].repeat_interleave(24, 1)[:, :columns]
        codes = to_fp8(weight, spread)
        expected[name] = codes.float() * spread
        return {"weight": codes, "weight_scale_inv": scale}

    settings = {"quant_method": "fp8", "weight_block_size": [24, 24], "activation_scheme": "dynamic"}
    for name, linear in read(base, tmp_path / "q", settings, encode).items():
        assert torch.equal(linear.weight.dequantize(), expected[name])
        assert linear.inputs is not None
        assert linear.inputs.fmt.group_size == 24


def to_fp4(weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes of a weight, and the values that they stand for, in units of `factor`."""
    units = weight / factor
    code = (units.abs()[..., None] - E2M1).abs().argmin(-1)
    values = E2M1[code] * units.sign()
    codes = (code + 8 * (units < 0)).to(torch.uint8).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, values


@pytest.mark.parametrize("writer", ["compressed-tensors", "modelopt"])
def test_nvfp4(base: Path, tmp_path: Path, writer: str) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        groups = weight.view(len(weight), -1, 16)
        whole = 448 * 6 / weight.abs().amax()
        scale = (groups.abs().amax(-1) / 6 * whole).to(E4M3)
        packed, values = to_fp4(groups, (scale.float() / whole)[..., None])
        expected[name] = (values * (scale.float() * (1 / whole))[..., None]).flatten(1)
        if writer == "modelopt":
            return {
                "weight": packed,
                "weight_scale": scale,
                "weight_scale_2": 1 / whole,
                "input_scale": torch.tensor(0.01),
            }
        parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole.reshape(1)}
        return parts | {"input_global_scale": torch.tensor([100.0])}

    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    settings = section(args, args | {"dynamic": "local"}, "nvfp4-pack-quantized")
    settings = settings if writer == "compressed-tensors" else {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    for name, linear in read(base, tmp_path / "q", settings, encode).items():
        assert torch.equal(linear.weight.dequantize(), expected[name])
        assert isinstance(linear.inputs, FixedTensorScale)
    x = torch.randn(2, 16) * torch.tensor([[1.0], [30.0]])
    scale = (x.abs().amax(1, keepdim=True) / 6 / 0.01).clamp(max=448).to(E4M3).float() * 0.01
    assert linear.inputs is not None
    outputs = linear.inputs(torch.cat([x] * (linear.weight.shape[1] // 16), 1))[:, :16]
    assert torch.allclose(outputs, to_fp4(x, scale)[1] * scale)


@pytest.mark.parametrize(
    ("algorithm", "more", "message"),
    [
        ("W4A8_MXFP4_FP8", {}, "quant_algo=W4A8_MXFP4_FP8 in its quantization section, expected FP8, FP8_PER_CHANNEL"),
        ("NVFP4_AWQ", {"pre_quant_scale": torch.ones(2)}, "quant_algo=NVFP4_AWQ .* expected one that does not rescale"),
    ],
)
def test_other_algorithms_of_modelopt_are_refused(
    base: Path, tmp_path: Path, algorithm: str, more: made.Parts, message: str
) -> None:
    def encode(name: str, weight: Tensor) -> made.Parts:
        return {"weight": to_fp8(weight, torch.tensor(1.0)), "weight_scale": torch.tensor(1.0)} | {
            part: tensor.clone() for part, tensor in more.items()
        }

    made.quantized(base, tmp_path / "q", {"quant_method": "modelopt", "quant_algo": algorithm}, encode)
    reader = open_quantized(ModelConfig(name="x", path=str(tmp_path / "q")), 0).reader
    with pytest.raises(CheckpointError, match="has a format without a reader") as caught:
        reader.read("model.layers.0.mlp.up_proj")
    assert re.search(message, caught.value.detail)


def test_mxfp4(base: Path, tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        groups = weight.view(len(weight), -1, 32)
        exponent = groups.abs().amax(-1).log2().floor() - 2
        packed, values = to_fp4(groups, exponent.exp2()[..., None])
        expected[name] = (values * exponent.exp2()[..., None]).flatten(1)
        return {"weight_packed": packed, "weight_scale": (exponent + 127).to(torch.uint8)}

    args = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    for name, linear in read(base, tmp_path / "q", section(args, None, "mxfp4-pack-quantized"), encode).items():
        assert torch.equal(linear.weight.dequantize(), expected[name])
        assert linear.inputs is None


@pytest.mark.parametrize(
    ("bits", "symmetric", "dense"),
    [(4, True, True), (4, False, True), (8, True, True), (3, False, False), (3, False, True), (5, True, True)],
)
def test_packed_integers(base: Path, tmp_path: Path, bits: int, symmetric: bool, dense: bool) -> None:
    expected: dict[str, Tensor] = {}

    def words(matrix: Tensor) -> Tensor:
        """Codes that follow one another, or in fields of words: with 3 bits, ten a word."""
        if dense:
            return made.rows_of_words(matrix, bits)
        per = 32 // bits
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % per)).view(len(matrix), -1, per).long()
        joined = (padded << bits * torch.arange(per)).sum(-1)
        return (joined - (1 << 32) * (joined >> 31)).to(torch.int32)

    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, zero = made.grid(weight, bits, 16, symmetric)
        expected[name] = made.decoded(codes, scale, zero)
        parts = {"weight_packed": words(codes), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
        return parts if symmetric else parts | {"weight_zero_point": words(zero.t()).t()}

    args = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16, "symmetric": symmetric}
    for name, linear in read(base, tmp_path / "q", section(args, None, "pack-quantized"), encode).items():
        assert isinstance(linear.weight, IntQTensor)
        assert torch.equal(linear.weight.dequantize(), expected[name])


def test_int8_with_a_zero_point(base: Path, tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}

    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, zero = made.grid(weight, 8, weight.shape[1], False)
        expected[name] = made.decoded(codes, scale, zero)
        return {
            "weight": (codes - 128).to(torch.int8),
            "weight_scale": scale,
            "weight_zero_point": (zero - 128).to(torch.int8),
        }

    args = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    for name, linear in read(base, tmp_path / "q", section(args, inputs, "int-quantized"), encode).items():
        assert torch.equal(linear.weight.dequantize(), expected[name])
        assert linear.inputs is not None


def test_sparse_weights_are_refused(base: Path, tmp_path: Path) -> None:
    def encode(name: str, weight: Tensor) -> made.Parts:
        codes, scale, _ = made.grid(weight, 8, weight.shape[1], True)
        return {"weight": (codes - 128).to(torch.int8), "weight_scale": scale}

    settings = section({"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True})
    with pytest.raises(ValueError, match=r"sparsity_config.format=sparse-24-bitmask .*, expected dense"):
        read(base, tmp_path / "s", settings | {"sparsity_config": {"format": "sparse-24-bitmask"}}, encode)


def test_groups_of_settings_by_name(base: Path, tmp_path: Path) -> None:
    """Mixed schemes: the group with the linear's name or pattern comes before the one with its class."""
    settings = section({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True})
    eight = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    settings["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": eight}

    def encode(name: str, weight: Tensor) -> made.Parts:
        bits, size = (8, weight.shape[1]) if "down_proj" in name else (4, 16)
        codes, scale, _ = made.grid(weight, bits, size, True)
        return {"weight": (codes - (1 << bits - 1)).to(torch.int8), "weight_scale": scale}

    for name, linear in read(base, tmp_path / "q", settings, encode).items():
        assert isinstance(linear.weight, IntQTensor)
        assert linear.weight.fmt.bits == (8 if "down_proj" in name else 4)
