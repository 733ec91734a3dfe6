"""AdditiveQTensor against float64 for both ways to multiply, its stored bits, and its tuner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.core.formats import AdditiveQTensor, Gather
from harness.core.formats.additive import _LOOKUP_ROWS, half
from harness.nn import QuantLinear

ROWS, GROUPS = 37, 11  # odd, so no power of two

SHAPES = [(8, 2, 8), (4, 1, 4), (4, 3, 16), (12, 1, 8), (12, 2, 4), (8, 3, 16), (16, 1, 8)]  # bits, codebooks, size


def random(bits: int, count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, and float16 codebooks and scales, with a different scale for each row."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (GROUPS, count, ROWS), generator=generator)
    codebooks = torch.randn(count, 1 << bits, size, generator=generator).half()
    scale = torch.linspace(0.1, 3, ROWS)[torch.randperm(ROWS, generator=generator)].half()
    return codes, codebooks, scale


def naive(codes: Tensor, codebooks: Tensor, scale: Tensor) -> Tensor:
    """The decoded weight in float64, computed for one group of one row at a time."""
    groups, count, rows = codes.shape
    weight = []
    for r in range(rows):
        parts = [sum(codebooks[m, codes[j, m, r]].double() for m in range(count)) for j in range(groups)]
        weight.append(float(scale[r]) * torch.cat(parts))  # type: ignore[arg-type]
    return torch.stack(weight)


def relative(values: Tensor, expected: Tensor) -> float:
    """Relative error |values - expected| / |expected|."""
    return float((values.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("bits", "count", "size"), SHAPES)
def test_it_decodes_to_the_sum_of_its_entries(bits: int, count: int, size: int) -> None:
    parts = random(bits, count, size)
    quantized = AdditiveQTensor(*parts)
    assert quantized.shape == (ROWS, GROUPS * size)
    assert torch.equal(quantized.codes.long(), parts[0])
    assert relative(quantized.dequantize(torch.float64), naive(*parts)) == 0
    assert relative(quantized.dequantize(), naive(*parts)) <= 1e-6
    assert relative(quantized.dequantize(torch.bfloat16), naive(*parts)) <= 4e-3


@pytest.mark.parametrize("tokens", [1, _LOOKUP_ROWS, _LOOKUP_ROWS + 1, 40])
@pytest.mark.parametrize(("bits", "count", "size"), SHAPES)
def test_both_paths_are_the_product_with_the_decoded_weight(bits: int, count: int, size: int, tokens: int) -> None:
    parts = random(bits, count, size)
    quantized = AdditiveQTensor(*parts)
    inputs = torch.randn(tokens, quantized.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bias = torch.arange(ROWS, dtype=torch.float64)
    for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        rounded = inputs.to(dtype)
        expected = rounded.double() @ naive(*parts).T
        outputs = quantized.linear(rounded, None)
        assert outputs.dtype == dtype
        assert relative(outputs, expected) <= limit
        outputs = quantized.linear(rounded.view(tokens, 1, -1), bias.to(dtype))
        assert outputs.shape == (tokens, 1, ROWS)
        assert relative(outputs.view(tokens, ROWS), expected + bias) <= limit


def test_slabs_of_rows_give_the_result_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = AdditiveQTensor(*random(8, 2, 8))
    whole, inputs = quantized.dequantize(), torch.randn(9, quantized.shape[1])
    product = quantized.linear(inputs, None)
    monkeypatch.setattr("harness.core.formats.qtensor._SLAB_VALUES", 5 * quantized.shape[1])
    assert torch.equal(quantized.dequantize(), whole)
    assert relative(quantized.linear(inputs, None), product) <= 1e-6


@pytest.mark.parametrize(("bits", "count", "size"), SHAPES)
def test_bits_are_those_of_codes_codebooks_and_scales(bits: int, count: int, size: int) -> None:
    quantized = AdditiveQTensor(*random(bits, count, size))
    weights = ROWS * GROUPS * size
    codes = -(-ROWS * GROUPS * count * bits // 8) * 8  # whole bytes
    assert quantized.stored_bits == codes + 16 * count * size * (1 << bits) + 16 * ROWS
    assert quantized.bits_per_weight == quantized.stored_bits / weights
    packed = QuantLinear(quantized, None, torch.float64).pack()  # no kernel of float64
    assert packed.kernel == "additive"
    assert sum(buffer.nbytes for buffer in packed.buffers()) * 8 == quantized.stored_bits


def test_wrong_shapes_and_overflow_of_float16_are_refused() -> None:
    codes, codebooks, scale = random(4, 2, 8)
    with pytest.raises(ValueError, match=r"scale \(36,\); expected \(2, entries, group_size\) and \(37,\)"):
        AdditiveQTensor(codes, codebooks, scale[:-1])
    with pytest.raises(ValueError, match="codebooks have 15 entries; expected a power of two"):
        AdditiveQTensor(codes.clamp(max=14), codebooks[:, :15], scale)
    with pytest.raises(ValueError, match="codebooks reaches 1e.05; expected at most 65504, float16's largest"):
        AdditiveQTensor(codes, torch.full((2, 16, 8), 1e5), scale)


@pytest.mark.parametrize("entries", [4, 64])
def test_the_transpose_of_gather_is_its_transpose(entries: int) -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, entries - 1, (50, 3), generator=generator)  # the last entry is never used
    codebooks = torch.randn(3, entries, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    expected = sum(codebooks[m][codes[:, m]] for m in range(3))
    assert isinstance(expected, Tensor)
    gather = Gather(codes, entries)
    assert relative(gather.apply(codebooks.detach()), expected.detach()) <= 1e-14
    (gradient,) = torch.autograd.grad(expected, codebooks, vectors)
    assert relative(gather.transpose(vectors), gradient) <= 1e-14
    assert torch.equal(gather.transpose(vectors)[:, -1], torch.zeros(3, 5, dtype=torch.float64))


def test_the_tuner_decodes_differentiates_and_stores() -> None:
    codes, codebooks, scale = random(8, 2, 8)
    quantized = AdditiveQTensor(codes, codebooks, scale)
    tuner = quantized.tuner()
    values = {name: value.clone().requires_grad_() for name, value in tuner.values.items()}
    assert {name: value.dtype for name, value in values.items()} == {
        "codebooks": torch.float32,
        "scale": torch.float32,
    }
    weight = tuner.weight(values)
    assert relative(weight.detach(), quantized.dequantize()) <= 1e-7
    pull = torch.randn(quantized.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(weight, list(values.values()), pull)
    vectors = sum(values["codebooks"][m][codes[:, m].T] for m in range(2))
    assert isinstance(vectors, Tensor)
    plain = values["scale"][:, None] * vectors.reshape(quantized.shape)
    for gradient, expected in zip(gradients, torch.autograd.grad(plain, list(values.values()), pull), strict=True):
        assert relative(gradient, expected) <= 1e-6

    moved = {name: value * 1.5 for name, value in values.items()}
    tuner.accept(moved)
    assert quantized.codebooks.dtype == quantized.scale.dtype == torch.float16
    assert relative(quantized.dequantize(), 2.25 * weight.detach()) <= 2e-3
    assert torch.equal(quantized.codebooks, (codebooks.float() * 1.5).half())
    with pytest.raises(ValueError, match="scale reaches 3e.05"):
        tuner.accept(moved | {"scale": values["scale"] * 1e5})
    assert torch.equal(quantized.scale, (scale.float() * 1.5).half()), "a refused update must store nothing"


def test_floats_beyond_float16_are_refused_at_both_ends() -> None:
    values = torch.linspace(-1, 1, 50)
    assert torch.equal(half(values, "x"), values.half())
    with pytest.raises(ValueError, match="^scale reaches 1e\\+05; expected at most 65504"):
        half(values * 1e5, "scale")
    with pytest.raises(ValueError, match="^scale is 1e-07, below float16's range; expected 6e-5 or more, skip"):
        half(values * 1e-7, "scale")
    with pytest.raises(ValueError, match="below float16's range"):
        half(values * 1e-30, "scale")
    assert not half(values * 1e-30, "scale", whole=torch.ones(3)).any()  # tiny relative to the others
    assert not half(torch.zeros(3), "scale").any()
