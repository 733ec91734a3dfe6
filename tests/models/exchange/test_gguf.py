"""GGUF blocks decode to the bits of the package gguf, and the rows of a real file are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import nn

from harness.core import IntQTensor
from harness.core.formats import OffsetQTensor
from harness.kernels.native import grouped, library
from harness.models.checkpoint import CheckpointError
from harness.models.exchange import gguf
from harness.models.exchange.gguf import GGUF, StoredMatrix
from harness.models.exchange.gguf_types import READ
from harness.models.exchange.reader import FileQTensor

# Where the float16 factors of a block are.
HALVES = {
    "Q4_0": slice(0, 2),
    "Q4_1": slice(0, 4),
    "Q5_0": slice(0, 2),
    "Q5_1": slice(0, 4),
    "Q8_0": slice(0, 2),
    "Q2_K": slice(80, 84),
    "Q3_K": slice(108, 110),
    "Q4_K": slice(0, 4),
    "Q5_K": slice(0, 4),
    "Q6_K": slice(208, 210),
    "IQ4_NL": slice(0, 2),
}


def random_rows(kind: str, rows: int = 24, columns: int = 512) -> np.ndarray:
    """Rows of blocks with any codes and finite factors."""
    random = np.random.default_rng(0)
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = random.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    part = HALVES[kind]
    factors = random.normal(size=(*blocks.shape[:2], (part.stop - part.start) // 2)).astype(np.float16)
    blocks[..., part] = factors.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", HALVES)
def test_every_type_decodes_as_the_package_does(kind: str) -> None:
    data = random_rows(kind)
    expected = dequantize(data, GGMLQuantizationType[kind])
    linear = nn.Linear(expected.shape[1], 16, bias=False)
    order = torch.randperm(len(expected))[:16]
    linear.weight = nn.Parameter(torch.from_numpy(expected)[order], requires_grad=False)
    found = dict(_find([StoredMatrix("m", kind, data)], {"x": linear}))
    weight = found["x"].weight
    assert torch.equal(weight.dequantize(), linear.weight)
    assert found["x"].stored_bits == 8 * data[:16].nbytes
    assert isinstance(weight, FileQTensor) == (kind == "IQ4_NL")
    assert isinstance(weight, OffsetQTensor) == (kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))


def _find(matrices: list[StoredMatrix], linears: dict[str, nn.Module]) -> list[tuple[str, gguf.StoredLinear]]:
    file = GGUF(Path("x.gguf"))
    file.__dict__["matrices"] = matrices  # of a cached property
    return list(file.find(linears))


def test_a_linear_with_a_row_that_no_matrix_has_is_not_found() -> None:
    data = random_rows("Q4_0")
    weight = torch.from_numpy(dequantize(data, GGMLQuantizationType.Q4_0))
    linear, other = nn.Linear(512, len(weight)), nn.Linear(512, len(weight))
    linear.weight = nn.Parameter(weight.flip(0))
    other.weight = nn.Parameter(weight.clone())
    other.weight.data[3, 5] += 1e-3
    assert [name for name, _ in _find([StoredMatrix("m", "Q4_0", data)], {"a": other, "b": linear})] == ["b"]


@pytest.mark.skipif(not library.available(), reason="the native library is not built")
@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "Q3_K", "Q6_K", "Q4_0"])
def test_the_native_kernel_runs_them(kind: str) -> None:
    data = random_rows(kind)
    if kind == "Q4_K":
        data.reshape(len(data), -1, 144)[:, :, 4] &= 0xC0  # scales of 0 with offsets
    weight = READ[kind]("x", data)
    assert isinstance(weight, IntQTensor | OffsetQTensor)
    assert grouped.supports(weight, torch.float32)
    inputs = torch.randn(5, 512)
    exact = inputs.double() @ weight.dequantize(torch.float64).t()
    outputs = grouped.build(weight)(inputs, None)
    assert float((outputs - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("end", [0, 3, 20, 200])
def test_a_damaged_file_is_one_line(tmp_path: Path, end: int) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * end)
    with pytest.raises(CheckpointError) as caught:
        _ = GGUF(file).matrices
    assert "x.gguf is damaged" in caught.value.detail
