"""Checkpoints that libraries wrote (tests/data/checkpoints): weights and inputs are those of the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.nn import QuantLinear
from tests.conftest import ROOT
from tests.models.exchange.test_integers import source_of

DATA = ROOT / "tests" / "data" / "checkpoints"
FOLDERS = sorted(path.parent for path in DATA.glob("*/config.json"))
WITH_INPUTS = [folder for folder in FOLDERS if (folder / "inputs.safetensors").is_file()]
LAST_BITS = 2.0**-22
# The library divides by a scale where this project multiplies by its reciprocal, or multiplies in another order.
NEAR = {"bitsandbytes_int8", "llmcompressor_nvfp4"}


def same(weight: Tensor, expected: Tensor, folder: Path) -> bool:
    """Whether a decoded weight is that of the library: to the bit, but for the formats of `NEAR`."""
    if folder.name in NEAR:
        return torch.allclose(weight, expected, rtol=LAST_BITS, atol=0)
    return torch.equal(weight, expected)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_weights_are_those_of_the_library(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    source = source_of(folder)
    model = source.load(torch.float32, torch.device("cpu"))
    assert set(source.reader.linears) == set(expected)
    for name, weight in expected.items():
        assert same(source.reader.read(name).weight.dequantize(), weight, folder), name
        assert same(model.get_parameter(f"{name}.weight"), weight, folder), name
    assert [name for name, linear in source.stored(model) if linear is not None] == list(source.reader.linears)


@pytest.mark.parametrize("folder", WITH_INPUTS, ids=lambda folder: folder.name)
def test_inputs_are_those_of_the_library(folder: Path) -> None:
    """Scales at run time, which libraries compute and divide by in another order, may differ in the last bit."""
    expected, reader = load_file(folder / "inputs.safetensors"), source_of(folder).reader
    assert {name for name in reader.linears if reader.read(name).inputs is not None} == set(expected)
    for name, (given, rounded) in expected.items():
        inputs = reader.read(name).inputs
        assert inputs is not None
        torch.testing.assert_close(inputs(given), rounded, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_packed_linears_compute_with_the_weights(folder: Path) -> None:
    reader = source_of(folder).reader
    for name in reader.linears:
        weight = reader.read(name).weight
        x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = x.double() @ weight.dequantize(torch.float64).t()
        packed = QuantLinear(weight, None, torch.float32).pack()
        assert (packed(x) - expected).norm() < 1e-5 * expected.norm(), name
