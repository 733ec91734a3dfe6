"""Tables of levels: published levels, the nearest by brute force, stored bits, and the codes of bitsandbytes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import build
from harness.core import LevelsQTensor, LevelsWeight, Scheme, Stats, round_to_nearest
from harness.core.formats import tables
from harness.core.formats.levels import nearest
from harness.core.formats.levels_weight import NESTED_BLOCK, encode_blocks
from harness.core.formats.tables import Table, dynamic_levels
from harness.nn import QuantLinear
from methods.nf4 import FP4, NF4
from tests.conftest import resolve

NF4_LEVELS = """-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.0910500 0
    .0795803 .1609302 .2461123 .3379152 .4407098 .5626170 .7229568 1"""  # QLoRA, appendix E
FP4_LEVELS = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]  # for sign bit 0
# Max 1960, "Quantizing for minimum distortion", table 1: positive output levels and mean squared errors.
LLOYD_MAX = {
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}
FLAT: dict[str, Any] = {"granularity": "flat", "group_size": 64}
TABLES: list[Table] = ["nf4", "fp4"]
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"table": "nf4", **FLAT, "double_quant": True},
    "fp4": {"table": "fp4", **FLAT},
    "nf4_group": {"table": "nf4", "group_size": 24, "scale_dtype": "float16"},
    "nf4_tensor": {"table": "nf4", "granularity": "tensor"},
    "lloyd_max_2": {"table": "lloyd_max", "bits": 2, "group_size": 16},
    "lloyd_max_3": {"table": "lloyd_max", "bits": 3, "granularity": "channel", "scale_dtype": "bfloat16"},
    "lloyd_max_6": {"table": "lloyd_max", "bits": 6, "group_size": 32, "scale_dtype": "float16"},
}
# Blocks within rows, blocks that span rows, a short last block, fewer values than a block, an odd count, two parts.
SHAPES = [(40, 128), (12, 96), (5, 70), (3, 7), (9, 25), (600, 576)]

# bitsandbytes finds 8-bit codes with a table of 2^16 cells, so its midpoint between two levels is off by up to half a
# cell of 2 / 2^16, and the difference of the distances to both levels by twice that.
_TABLE = 2.0**-15


def weights(rows: int, columns: int) -> Tensor:
    """Weights; each block has a different range."""
    spread = torch.rand(rows * columns // 32 + 1).mul(3).exp().repeat_interleave(32)[: rows * columns]
    return torch.randn(rows, columns) * spread.view(rows, columns) * 0.02


def quantized(weight: Tensor, table: Table = "nf4", double_quant: bool = False, size: int = 64) -> LevelsQTensor:
    fmt = LevelsWeight(table=table, granularity="flat", group_size=size, double_quant=double_quant)
    qtensor = round_to_nearest(weight, fmt)
    assert isinstance(qtensor, LevelsQTensor)
    return qtensor


def test_levels_are_the_published_ones() -> None:
    expected = torch.tensor(list(map(float, NF4_LEVELS.split())))
    torch.testing.assert_close(tables.levels("nf4", 4), expected, rtol=0, atol=6e-8)
    expected = torch.tensor(FP4_LEVELS + [-level for level in FP4_LEVELS])
    torch.testing.assert_close(tables.levels("fp4", 4), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_lloyd_max_levels_and_their_error_are_those_of_the_paper(bits: int) -> None:
    positive, error = LLOYD_MAX[bits]
    levels = tables.levels("lloyd_max", bits)
    torch.testing.assert_close(levels[len(levels) // 2 :], torch.tensor(positive), rtol=0, atol=6e-4)
    assert torch.equal(levels, -levels.flip(0))
    values = torch.special.ndtri((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    rounded = levels.double()[nearest(values, levels.double()).int()]
    assert float((values - rounded).square().mean()) == pytest.approx(error, rel=2e-3)


def test_the_dynamic_map_has_as_many_levels_a_decade_as_its_fraction_has_values() -> None:
    levels = dynamic_levels()
    assert torch.equal(levels, levels.unique())
    assert len(levels) == 256
    for decade in range(7):
        inside = (levels.abs() > 10.0 ** -(decade + 1)) & (levels.abs() < 10.0**-decade)
        assert int(inside.sum()) == 2 * 2 ** (6 - decade)
        assert torch.equal(levels[inside], -levels[inside].flip(0))
    assert float(levels[254]) == pytest.approx(1 - 0.9 / 128, rel=1e-6)
    assert float(levels[128]) == pytest.approx(0.55e-6, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:5])
@pytest.mark.parametrize("table", TABLES)
def test_codes_are_the_nearest_of_all_levels_and_decode_as_level_times_scale(
    table: Table, shape: tuple[int, int]
) -> None:
    weight = weights(*shape)
    qtensor = quantized(weight, table)
    levels, values = tables.levels(table, 4).double(), weight.double().flatten().tolist()
    codes, decoded = qtensor.codes.flatten().tolist(), qtensor.dequantize().double().flatten().tolist()
    assert qtensor.codes.shape == shape
    assert qtensor.scale.numel() == math.ceil(weight.numel() / 64)
    for start in range(0, weight.numel(), 64):
        block = slice(start, start + 64)
        scale = max(map(abs, values[block]))
        for value, code, back in zip(values[block], codes[block], decoded[block], strict=True):
            assert back == pytest.approx(float(levels[code]) * scale, rel=1e-6)
            best = float((levels * scale - value).abs().min())
            assert abs(back - value) <= best + 1e-6 * scale


@pytest.mark.parametrize("name", FORMATS)
def test_each_value_is_the_nearest_level_times_the_stored_scale(name: str) -> None:
    fmt, weight = LevelsWeight(**{**FORMATS[name], "double_quant": False}), weights(12, 96)
    qtensor = round_to_nearest(weight, fmt)
    assert isinstance(qtensor, LevelsQTensor)
    scale = qtensor.scales().double()
    per_value = scale.flatten().repeat_interleave(weight.numel() // scale.numel()).view(weight.shape)
    errors = (fmt.levels.double() * per_value[..., None] - weight.double()[..., None]).abs().amin(-1)
    found = (qtensor.dequantize(torch.float64) - weight.double()).abs()
    assert bool((found <= errors + 1e-6 * per_value).all())
    top = fmt.levels.max().double() * per_value
    torch.testing.assert_close(top.amax(), weight.double().abs().amax(), rtol=4e-3, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_snap_is_decode_of_encode_and_decoded_values_are_fixed_points(name: str) -> None:
    fmt, weight = LevelsWeight(**{**FORMATS[name], "double_quant": False}), weights(24, 96)
    params, groups = fmt.weight_params(weight).spread(), fmt.to_groups(weight)
    snapped = fmt.snap(groups, params)
    assert torch.equal(snapped, fmt.decode(fmt.encode(groups, params), params))
    assert torch.equal(fmt.snap(snapped, params), snapped)
    assert torch.equal(fmt.snap(groups, params, out=torch.empty_like(groups)), snapped)
    assert torch.equal(fmt.from_groups(snapped, (24, 96)), round_to_nearest(weight, fmt).dequantize())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(40, 96), (40, 192)])
def test_stored_bits_equal_the_analytic_figure(name: str, shape: tuple[int, int]) -> None:
    fmt = LevelsWeight(**FORMATS[name])
    assert round_to_nearest(weights(*shape), fmt).stored_bits == fmt.stored_bits(shape)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("table", TABLES)
def test_codes_scales_and_values_are_those_of_bitsandbytes(
    table: Table, shape: tuple[int, int], double_quant: bool
) -> None:
    from bitsandbytes import functional

    weight = weights(*shape)
    qtensor = quantized(weight, table, double_quant)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=table)
    assert torch.equal(qtensor.levels, state.code)
    pairs = packed.flatten()
    theirs = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[: weight.numel()].view(shape)
    _agree_but_for_ties(qtensor.codes, theirs, _shares(weight.flatten(), 64).view(shape), qtensor.levels)
    theirs_scales, scale = state.absmax, qtensor.scale.flatten()
    if double_quant:
        assert qtensor.nested_levels is not None
        assert qtensor.nested_scale is not None
        assert qtensor.offset is not None
        assert torch.equal(qtensor.nested_levels, state.state2.code)
        exact = quantized(weight, table).scale.flatten() - qtensor.offset
        # A single scale equals the mean, so its nested scale is 0.
        nonzero = qtensor.nested_scale.repeat_interleave(NESTED_BLOCK)[: len(exact)] > 0
        shares = _shares(exact, NESTED_BLOCK)[nonzero]
        _agree_but_for_ties(scale[nonzero], state.absmax[nonzero], shares, qtensor.nested_levels, _TABLE)
        torch.testing.assert_close(qtensor.offset, state.offset, rtol=1e-6, atol=0)
        torch.testing.assert_close(qtensor.nested_scale, state.state2.absmax, rtol=1e-6, atol=0)
        theirs_scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        same = scale == state.absmax
        torch.testing.assert_close(qtensor.scales().flatten()[same], theirs_scales[same], rtol=1e-6, atol=1e-8)
    else:
        assert torch.equal(scale, state.absmax)
    scales = qtensor.scales().flatten()
    decoded = qtensor.levels[theirs.int()].flatten() * scales.repeat_interleave(64)[: weight.numel()]
    if shape[1] % 64 == 0:  # bitsandbytes decodes blocks that span rows wrongly on some CPUs
        decoded = functional.dequantize_4bit(packed, state).flatten()
    same = (qtensor.codes == theirs).flatten() & _of_blocks(_close(scales, theirs_scales), weight.numel())
    torch.testing.assert_close(qtensor.dequantize().flatten()[same], decoded[same], rtol=2e-6, atol=1e-9)
    assert same.float().mean() > 0.99


def _shares(values: Tensor, block_size: int) -> Tensor:
    """Values divided by the largest magnitude of their block, in float64."""
    parts = [block / block.abs().max().clamp(min=1e-38) for block in values.double().split(block_size)]
    return torch.cat(parts)


def _agree_but_for_ties(ours: Tensor, theirs: Tensor, shares: Tensor, levels: Tensor, slack: float = 1e-6) -> None:
    """Few codes differ, and where they do, both levels are equally near to the value, within `slack`."""
    decoded = levels[ours.int()].double(), levels[theirs.int()].double()
    differ = ours != theirs
    assert int(differ.sum()) <= 1 + differ.numel() // 200
    first, second = ((level - shares).abs()[differ] for level in decoded)
    assert bool(((first - second).abs() <= slack).all())


def _close(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs() <= 1e-6 * second.abs() + 1e-9


def _of_blocks(flags: Tensor, count: int) -> Tensor:
    return flags.repeat_interleave(64)[:count]


@pytest.mark.parametrize("size", [1, 5, 64, 96])
def test_blocks_of_any_size(size: int) -> None:
    weight = weights(10, 33)
    qtensor = quantized(weight, size=size)
    largest = [block.abs().max() for block in weight.flatten().split(size)]
    assert torch.equal(qtensor.scale.flatten(), torch.stack(largest))
    tops = torch.stack([block.abs().max() for block in qtensor.dequantize().flatten().split(size)])
    torch.testing.assert_close(tops, qtensor.scale.flatten())
    if size == 1:
        torch.testing.assert_close(qtensor.dequantize(), weight)


def test_nearest_takes_levels_in_any_order_and_the_lower_of_two() -> None:
    levels = torch.tensor([3.0, -1.0, 1.0])
    assert nearest(torch.tensor([[-9.0, 0.0], [2.0, 2.1]]), levels).tolist() == [[1, 1], [2, 0]]


def test_scales_are_quantized_in_blocks_with_a_scale_each() -> None:
    values = torch.cat([torch.tensor([1.0, -0.5]).repeat(NESTED_BLOCK // 2), torch.tensor([8.0, 4.0])])
    codes, absmax = encode_blocks(values, torch.tensor([-0.5, 0.5, 1.0]))
    assert absmax.tolist() == [1.0, 8.0]
    assert codes[[0, 1, -2, -1]].tolist() == [2, 0, 2, 1]


def test_double_quantization_costs_little() -> None:
    weight = weights(300, 320)
    single, double = (quantized(weight, double_quant=on) for on in (False, True))
    assert torch.equal(single.codes, double.codes)
    assert (double.scales() - single.scales()).norm() <= 0.01 * single.scales().norm()
    errors = [float((qtensor.dequantize() - weight).norm() / weight.norm()) for qtensor in (single, double)]
    assert 0.05 < errors[0] <= errors[1] * 1.001
    assert errors[1] < errors[0] * 1.01


def test_nf4_suits_a_normal_weight_better_than_fp4() -> None:
    weight = torch.randn(64, 256)
    nf4, fp4 = (float((quantized(weight, table).dequantize() - weight).norm()) for table in TABLES)
    assert nf4 < 0.9 * fp4


def test_bits_are_counted_from_what_is_stored() -> None:
    rows, columns = 1024, 2048
    weight = torch.randn(rows, columns)
    books = (16 + 256 + 1) * 32  # both tables and the offset
    double = quantized(weight, double_quant=True)
    assert double.stored_bits == rows * columns * (4 + 8 / 64 + 32 / (64 * 256)) + books
    assert double.bits_per_weight == pytest.approx(4.127, abs=5e-3)
    assert quantized(weight, "fp4").stored_bits == rows * columns * (4 + 32 / 64) + 16 * 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_and_inputs_of_any_float_type(dtype: torch.dtype) -> None:
    weight, inputs = weights(24, 65).to(dtype), torch.randn(2, 3, 65).to(dtype)
    qtensor = quantized(weight, double_quant=True)
    assert torch.equal(qtensor.codes, quantized(weight.float()).codes)
    assert torch.equal(qtensor.dequantize(dtype), qtensor.dequantize().to(dtype))
    packed = QuantLinear(qtensor, None, dtype).pack()
    assert packed.kernel == "reference"
    torch.testing.assert_close(packed(inputs), inputs @ qtensor.dequantize(dtype).T, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, -5e-5])
def test_constant_weights_stay_finite_and_close(value: float) -> None:
    for name in ("nf4", "fp4", "nf4_tensor"):
        decoded = round_to_nearest(torch.full((8, 96), value), LevelsWeight(**FORMATS[name])).dequantize()
        assert torch.isfinite(decoded).all()
        assert (decoded - value).abs().max() <= 1e-6 * abs(value)


def test_scales_below_their_dtype_are_refused_and_lost_groups_counted() -> None:
    fmt = LevelsWeight(table="nf4", group_size=32, scale_dtype="float16")
    with pytest.raises(ValueError, match=r"scheme\.weight\.scale_dtype=float16 cannot hold .*scale_dtype=float32"):
        round_to_nearest(weights(8, 96) * 1e-8, fmt)
    weight = weights(8, 96)
    weight[3] *= 1e-8
    with pytest.warns(UserWarning, match=r"^3 of 24 groups have scales below the range of scheme\.weight"):
        round_to_nearest(weight, fmt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "nf4", "bits": 3}, "bits=3 does not match table=nf4; expected bits=4"),
        ({"table": "lloyd_max", "bits": 1}, "bits=1 does not match table=lloyd_max; expected 2 to 8"),
        ({"table": "nf4", "granularity": "flat"}, "group_size=-1 with granularity=flat; expected a positive number"),
        ({"table": "nf4", "group_size": 0}, "group_size=0 is out of range; expected a positive number, or -1"),
        (
            {"table": "nf4", "double_quant": True, "scale_dtype": "float16"},
            "double_quant=true has no use with scale_dtype=float16; set scale_dtype=float32, or double_quant=false",
        ),
    ],
)
def test_fields_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LevelsWeight(**options)


def test_groups_that_span_rows_are_only_rounded() -> None:
    fmt = LevelsWeight(table="nf4", **FLAT)
    assert fmt.span(128) == 64
    with pytest.raises(ValueError, match=r"group_size=64 does not divide in_features=70, .* use a divisor, or method="):
        fmt.span(70)


def test_what_the_methods_refuse() -> None:
    for method, name, message in (
        (NF4(), "group64", "scheme=group64 is another format than nf4; use scheme=nf4"),
        (NF4(), "fp4", "scheme=fp4 is another format than nf4; use scheme=nf4"),
        (FP4(), "none", "scheme=none is another format than fp4; use scheme=fp4"),
    ):
        with pytest.raises(ValueError, match=message):
            method.check(build(Scheme, resolve(f"scheme={name}")["scheme"], "scheme"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantized(torch.full((2, 3), math.inf))
    with pytest.raises(ValueError, match="cannot hold the scale 1e\\+300"):
        quantized(torch.full((2, 3), 1e300, dtype=torch.float64))


def test_the_methods_round_to_nearest_in_the_format_of_their_scheme() -> None:
    weight = weights(12, 128)
    for method in (NF4(), FP4()):
        scheme = build(Scheme, resolve(f"method={method.table}")["scheme"], "scheme")
        found = method.quantize(weight, scheme, Stats())
        expected = quantized(weight, method.table, double_quant=True)  # type: ignore[arg-type]
        assert torch.equal(found.dequantize(), expected.dequantize())
        larger = dataclasses.replace(scheme, weight=dataclasses.replace(scheme.format, group_size=128))
        assert method.quantize(weight, larger, Stats()).stored_bits < found.stored_bits
