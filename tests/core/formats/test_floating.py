"""Small floats with shared scales: hand-computed groups, the nearest value by brute force, stored bits, and torchao."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.core import FloatActivation, FloatQTensor, FloatWeight, round_to_nearest
from harness.core.formats import InputQuantizer
from harness.core.formats.floating import factor_of
from tests.core.formats import torchao_codes

MX = {"granularity": "group", "group_size": 32, "scale_dtype": "e8m0"}
NV = {"element": "e2m1", "granularity": "group", "group_size": 16, "scale_dtype": "e4m3", "tensor_scale": True}
FORMATS: dict[str, dict[str, Any]] = {
    "fp8_channel": {"element": "e4m3"},
    "fp8_e5m2_bf16": {"element": "e5m2", "scale_dtype": "bfloat16"},
    "fp8_tensor": {"element": "e4m3", "granularity": "tensor"},
    "fp8_block": {"element": "e4m3", "granularity": "block", "group_size": 24},
    "mxfp8": {"element": "e4m3", **MX},
    "mxfp6": {"element": "e2m3", **MX},
    "mxfp6_e3m2": {"element": "e3m2", **MX},
    "mxfp4": {"element": "e2m1", **MX},
    "mxfp4_ceil": {"element": "e2m1", **MX, "scale_rule": "ceil"},
    "mxfp4_7.25": {"element": "e2m1", **MX, "scale_rule": "ceil", "top": 7.25},
    "nvfp4": NV,
    "nvfp4_4": {**NV, "top": 4.0},
    "nvfp4_mse": {**NV, "scale_search": "mse"},
    "nvfp4_four_over_six": {**NV, "scale_search": "four_over_six"},
    "mxfp4_mse": {"element": "e2m1", **MX, "scale_search": "mse"},
    "fp4_e4m3_alone": {**NV, "tensor_scale": False},
}
SHAPE = (40, 96)


def uneven(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with a different range in every eight values and a different offset in every row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    spread = torch.rand(rows, columns // 8, generator=generator).mul(4).exp().repeat_interleave(8, 1)
    return (weight + torch.randn(rows, 1, generator=generator)) * spread * 0.02


def absmax_of(weight: Tensor, fmt: FloatWeight) -> Tensor:
    """For every value the largest magnitude of those that share its scale, one cell at a time."""
    rows, columns = weight.shape
    size = fmt.group_size
    out = torch.empty(rows, columns, dtype=torch.float64)
    for i, j in itertools.product(range(rows), range(columns)):
        if fmt.granularity == "tensor":
            part = weight
        elif fmt.granularity == "channel":
            part = weight[i]
        elif fmt.granularity == "group":
            part = weight[i, j // size * size : j // size * size + size]
        else:
            part = weight[i // size * size : i // size * size + size, j // size * size : j // size * size + size]
        out[i, j] = part.double().abs().max()
    return out


def naive_scale(absmax: float, fmt: FloatWeight, largest_of_all: float) -> float:
    """The factor of a group by the formulas of floating.py, in float64; E4M3 by torch."""
    top = fmt.kind.largest if fmt.top is None else fmt.top
    if fmt.scale_dtype == "e8m0":
        exact = math.log2(absmax / top) if fmt.scale_rule == "ceil" else math.log2(absmax) - fmt.kind.largest_exponent
        return 2.0 ** (math.ceil(exact) if fmt.scale_rule == "ceil" else math.floor(exact))
    if fmt.scale_dtype == "e4m3":
        whole = largest_of_all / (448 * top) if fmt.tensor_scale else 1.0
        return float(torch.tensor(max(absmax / top / whole, 2.0**-6)).to(torch.float8_e4m3fn)) * whole
    return float(torch.tensor(absmax / top).to(getattr(torch, fmt.scale_dtype)))


@pytest.mark.parametrize("name", [name for name in FORMATS if "scale_search" not in FORMATS[name]])
def test_each_value_is_the_nearest_level_times_the_scale_of_its_group(name: str) -> None:
    fmt, weight = FloatWeight(**FORMATS[name]), uneven(*SHAPE)
    decoded = round_to_nearest(weight, fmt).dequantize(torch.float64)
    absmax, largest = absmax_of(weight, fmt), float(weight.abs().max())
    scales = {value: naive_scale(value, fmt, largest) for value in set(absmax.flatten().tolist())}
    scale = torch.tensor([scales[value] for value in absmax.flatten().tolist()]).view(SHAPE).double()
    levels = fmt.kind.levels[torch.isfinite(fmt.kind.levels)].double()
    steps = (weight.double() / scale)[..., None] - levels
    nearest = levels[steps.abs().argmin(-1)] * scale
    wrong = (decoded - nearest).abs() > 1e-6 * nearest.abs() + 1e-9 * scale
    ties = (steps.abs().sort(-1).values[..., :2].diff(dim=-1).squeeze(-1) < 1e-5).logical_and(wrong)
    assert not (wrong & ~ties).any()
    assert wrong.float().mean() < 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_snap_is_decode_of_encode_and_decoded_values_are_fixed_points(name: str) -> None:
    fmt, weight = FloatWeight(**FORMATS[name]), uneven(*SHAPE, seed=1)
    params, groups = fmt.weight_params(weight).spread(), fmt.to_groups(weight)
    snapped = fmt.snap(groups, params)
    assert torch.equal(snapped, fmt.decode(fmt.encode(groups, params), params))
    assert torch.equal(fmt.snap(snapped, params), snapped)
    assert torch.equal(fmt.from_groups(snapped, SHAPE), round_to_nearest(weight, fmt).dequantize())
    assert torch.equal(fmt.snap_weight(weight), round_to_nearest(weight, fmt).dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_stored_bits_equal_the_analytic_figure(name: str) -> None:
    fmt = FloatWeight(**FORMATS[name])
    assert round_to_nearest(uneven(*SHAPE), fmt).bits_per_weight == pytest.approx(fmt.bits_per_weight(SHAPE), rel=1e-12)


@pytest.mark.parametrize(("name", "bits"), [("mxfp4", 4.25), ("mxfp6", 6.25), ("mxfp8", 8.25)])
def test_bits_of_the_block_formats(name: str, bits: float) -> None:
    assert FloatWeight(**FORMATS[name]).bits_per_weight((64, 128)) == bits


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0, -5e-5])
def test_constant_weights_stay_finite_and_close(name: str, value: float) -> None:
    decoded = round_to_nearest(torch.full(SHAPE, value), FloatWeight(**FORMATS[name])).dequantize()
    alone = name == "fp4_e4m3_alone" and abs(value) < 1e-3  # the smallest scale is 2^-6
    assert torch.isfinite(decoded).all()
    assert (decoded - value).abs().max() <= (0.01 if alone else 0.26 * abs(value))


@given(name=st.sampled_from(sorted(FORMATS)), seed=st.integers(0, 2**16), power=st.integers(-12, 12))
def test_a_power_of_two_scales_the_result(name: str, seed: int, power: int) -> None:
    if name == "fp4_e4m3_alone":
        return  # its scales have a range
    fmt, weight = FloatWeight(**FORMATS[name]), uneven(8, 96, seed)
    plain, larger = round_to_nearest(weight, fmt), round_to_nearest(weight * 2.0**power, fmt)
    assert torch.equal(plain.codes, larger.codes)
    assert torch.equal(plain.dequantize() * 2.0**power, larger.dequantize())


@pytest.mark.parametrize(
    ("absmax", "floor", "ceil", "seven"),
    [(6.0, 1.0, 1.0, 1.0), (6.1, 1.0, 2.0, 1.0), (7.25, 1.0, 2.0, 1.0), (7.3, 1.0, 2.0, 2.0), (4.0, 1.0, 1.0, 1.0)],
)
def test_scale_rules_by_hand(absmax: float, floor: float, ceil: float, seven: float) -> None:
    """OCP floor, ceil, and ceil of absmax / 7.25, at the ends of their ranges."""
    weight = torch.linspace(-1, 1, 32)[None] * absmax
    for name, expected in (("mxfp4", floor), ("mxfp4_ceil", ceil), ("mxfp4_7.25", seven)):
        assert round_to_nearest(weight, FloatWeight(**FORMATS[name])).scale.float().item() == expected, name


@pytest.mark.parametrize("name", ["nvfp4_mse", "nvfp4_four_over_six", "mxfp4_mse"])
def test_a_search_keeps_the_scale_with_the_least_error(name: str) -> None:
    """By brute force: every group on its own, with every factor of its range."""
    fmt, weight = FloatWeight(**FORMATS[name]), uneven(6, 96)
    whole, groups = fmt.whole(weight), fmt.to_groups(weight)
    decoded = fmt.to_groups(fmt.snap_weight(weight))
    improved = 0
    for i, j in itertools.product(range(groups.shape[0]), range(groups.shape[1])):
        group = groups[i, j]
        errors = []
        for factor in (1.0, *fmt.factors):
            params = fmt.cover(group.min()[None] * factor, group.max()[None] * factor, whole)
            errors.append(float((fmt.snap(group, params) - group).square().sum()))
        assert float((decoded[i, j] - group).square().sum()) == pytest.approx(min(errors), rel=1e-5)
        improved += min(errors) < errors[0]
    assert improved


def test_four_over_six_makes_the_largest_value_a_four() -> None:
    """4.5 of 6 lies between two values, 3 of 4 does not."""
    group = torch.tensor([6.0, 4.5, 4.5, 4.5] * 4)[None]
    plain, searched = (
        round_to_nearest(group, FloatWeight(**FORMATS[name])) for name in ("nvfp4", "nvfp4_four_over_six")
    )
    assert torch.allclose(plain.dequantize(), torch.where(group == 6, 6.0, 4.0))
    assert torch.allclose(searched.dequantize(), group)


def test_the_slabs_of_a_large_weight_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: round_to_nearest(uneven(*SHAPE), FloatWeight(**kind)) for name, kind in FORMATS.items()}
    expected = {name: weight.dequantize() for name, weight in weights.items()}
    monkeypatch.setattr("harness.core.formats.qtensor._SLAB_VALUES", 17 * SHAPE[1])  # slabs of 16 rows
    x = torch.randn(3, SHAPE[1])
    for name, weight in weights.items():
        assert torch.equal(weight.dequantize(), expected[name]), name
        assert torch.allclose(weight.linear(x, None), x @ expected[name].T, rtol=1e-5, atol=1e-6), name


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="scheme.weight.group_size=32 does not divide in_features=40; use a divisor"):
        round_to_nearest(torch.ones(4, 40), FloatWeight(**FORMATS["mxfp4"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"element": "e9m9"}, "element=e9m9 is no float of 3 to 8 bits"),
        ({"scale_rule": "ceil"}, "scale_rule=ceil has no use with scale_dtype=float32; set scale_dtype=e8m0"),
        ({"top": 0.0}, "top=0 is out of range; expected more than 0, up to 896"),
        ({"tensor_scale": True}, "tensor_scale=true has no use with scale_dtype=float32; set scale_dtype=e4m3"),
        ({"scale_dtype": "e8m0", "top": 400.0}, "top=400 has no use with scale_rule=floor; set scale_rule=ceil"),
        ({"scale_search": "four_over_six"}, "has no use with element=e4m3 and scale_dtype=float32; expected e2m1"),
        ({"granularity": "block"}, "group_size=-1 with granularity=block; expected a positive number"),
        ({"group_size": 32}, "group_size=32 has no use with granularity=channel"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloatWeight(**{"element": "e4m3", **changes})


def test_a_width_cannot_be_chosen() -> None:
    fmt = FloatWeight(**FORMATS["mxfp4"])
    assert fmt.at(4) == fmt
    with pytest.raises(ValueError, match="a weight of element=e2m1 has 4 bits, not 3; use an integer scheme"):
        fmt.at(3)


INPUTS: dict[str, dict[str, Any]] = {
    "token": {"element": "e4m3"},
    "tensor": {"element": "e4m3", "granularity": "tensor"},
    "group": {"element": "e4m3", "granularity": "group", "group_size": 32},
    "mxfp4": {"element": "e2m1", **MX},
    "nvfp4": NV,
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_a_batch_are_rounded_as_each_sequence_alone(name: str) -> None:
    quantizer = InputQuantizer(FloatActivation(**INPUTS[name]))
    inputs = uneven(10, 80).view(2, 5, 80) * torch.tensor([1.0, 30.0])[:, None, None]
    together = quantizer(inputs)
    assert torch.equal(together, torch.cat([quantizer(part[None]) for part in inputs]))
    assert torch.equal(together[0], quantizer(inputs[0]))
    assert quantizer.integers is None
    assert (together - inputs).norm() / inputs.norm() < (0.2 if "4" in name else 0.04)


def test_groups_of_inputs_are_those_of_weights() -> None:
    inputs = uneven(6, 96)
    for name in ("mxfp4", "nvfp4"):
        expected = FloatWeight(**FORMATS[name]).snap_weight(inputs)
        assert torch.equal(InputQuantizer(FloatActivation(**INPUTS[name]))(inputs), expected), name


def test_static_inputs_have_the_calibrated_scale() -> None:
    fmt = FloatActivation(element="e4m3", granularity="tensor", dynamic=False)
    quantizer = InputQuantizer(fmt, (torch.tensor(-4.48), torch.tensor(1.0)))
    assert dict(quantizer.named_buffers()).keys() == {"scale"}
    assert torch.allclose(quantizer(torch.tensor([[4.48, 100.0, 0.01]])), torch.tensor([[4.48, 4.48, 0.01]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "group"}, "group_size=-1 does not fit granularity=group"),
        ({"group_size": 8}, "group_size=8 does not fit granularity=token"),
        ({"dynamic": False}, "dynamic=False has no meaning with granularity=token"),
        (
            {"dynamic": False, "granularity": "tensor", "scale_dtype": "e4m3", "tensor_scale": True},
            "a calibrated scale belongs to the whole tensor already",
        ),
    ],
)
def test_settings_of_inputs_that_exclude_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloatActivation(**{"element": "e4m3", **changes})


def test_qweight_and_scale_have_the_dtypes_of_torch() -> None:
    mx = round_to_nearest(uneven(*SHAPE), FloatWeight(**FORMATS["mxfp8"]))
    nv = round_to_nearest(uneven(*SHAPE), FloatWeight(**FORMATS["nvfp4"]))
    assert (mx.qweight.dtype, mx.scale.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    assert (nv.qweight.dtype, nv.scale.dtype, nv.qweight.shape) == (torch.uint8, torch.float8_e4m3fn, (40 * 48,))
    assert torch.equal(factor_of(nv.params()), nv.scale.float() * nv.tensor_scale)
    assert isinstance(nv, FloatQTensor)


def bytes_of(values: Tensor) -> bytes:
    return bytes(values.contiguous().view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize("rule", ["floor", "ceil"])
@pytest.mark.parametrize("name", torchao_codes.ELEMENTS)
def test_mx_codes_and_scales_are_those_of_torchao(name: str, rule: str) -> None:
    """Codes of 4 bits lie as here, the first in the lower bits of a byte. The scale of zeros is free."""
    fmt, expected = FloatWeight(**FORMATS[name], scale_rule=rule), torchao_codes.stored(f"{name}_{rule}")
    quantized = round_to_nearest(torchao_codes.weight(), fmt)
    groups = 2
    scale = bytes_of(quantized.scale)
    assert scale[: 3 * groups] + scale[4 * groups :] == (
        expected["scale"][: 3 * groups] + expected["scale"][4 * groups :]
    )
    assert bytes_of(quantized.qweight if name == "mxfp4" else quantized.codes) == expected["codes"]


def test_nvfp4_codes_and_scales_are_those_of_torchao() -> None:
    expected = torchao_codes.stored("nvfp4")
    quantized = round_to_nearest(torchao_codes.weight(), FloatWeight(**NV))
    assert quantized.tensor_scale is not None
    assert bytes_of(quantized.tensor_scale.reshape(1)) == expected["whole"]
    assert bytes_of(quantized.scale) == expected["scale"]
    assert bytes_of(quantized.qweight) == expected["codes"]
