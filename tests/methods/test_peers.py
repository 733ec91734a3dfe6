"""Compare peers with naive float64 versions of their formats, and check their messages when they cannot run."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import build
from harness.core import Scheme, Stats, round_to_nearest
from harness.core.formats import InputQuantizer
from harness.nn import QuantLinear
from harness.runs import execute_run
from methods.peers.bitsandbytes import Bnb4Bit, Bnb4BitQTensor, BnbFP4, BnbInt8, BnbInt8QTensor, BnbNF4
from tests.conftest import TINY, Done, resolve

FP4_LEVELS = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]  # for sign bit 0
NF4_LEVELS = """-1 -.6961928 -.5250731 -.3949175 -.2844414 -.1847734 -.0910500 0
    .0795803 .1609302 .2461123 .3379152 .4407098 .5626170 .7229568 1"""  # QLoRA, appendix E
LEVELS = {"nf4": list(map(float, NF4_LEVELS.split())), "fp4": FP4_LEVELS + [-level for level in FP4_LEVELS]}


def scheme(name: str) -> Scheme:
    return build(Scheme, resolve(f"scheme={name}")["scheme"], "scheme")


def int8(weight: Tensor, **options: Any) -> BnbInt8QTensor:
    qtensor = BnbInt8(**options).quantize(weight, scheme("llm_int8"), Stats())
    assert isinstance(qtensor, BnbInt8QTensor)
    return qtensor


def blocks(method: Bnb4Bit, **options: Any) -> Scheme:
    """The scheme of the method, with some `options` of its weight format."""
    usual = scheme(method.quant_type)
    return dataclasses.replace(usual, weight=dataclasses.replace(usual.format, **options))


def four_bit(method: Bnb4Bit, weight: Tensor, **options: Any) -> Bnb4BitQTensor:
    qtensor = method.quantize(weight, blocks(method, **options), Stats())
    assert isinstance(qtensor, Bnb4BitQTensor)
    return qtensor


def scheme_of(method: BnbInt8 | Bnb4Bit) -> Scheme:
    return scheme("llm_int8") if isinstance(method, BnbInt8) else blocks(method)


def outlying() -> Tensor:
    """Two sequences (2, T, K) with outliers in different channels."""
    inputs = torch.randn(2, 30, 64)
    inputs[0, ::3, 5] *= 20
    inputs[1, 1::4, 7] *= 30
    return inputs


def naive_product(inputs: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """Outlier channels as floats, others on int8 grids; a token's scale covers all its values below the threshold."""
    halves = inputs.half().double()
    outliers = halves.abs() >= threshold if threshold else torch.zeros_like(halves, dtype=torch.bool)
    scale = halves.masked_fill(outliers, 0).abs().amax(1, keepdim=True) / 127
    rows = weight.half().double()
    steps = rows.abs().amax(1, keepdim=True) / 127
    decoded = (rows / steps).round() * steps
    rounded = (halves / scale).round() * scale
    return torch.where(outliers.any(0), inputs.double(), rounded) @ decoded.T


@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_decomposition_of_each_sequence(threshold: float, dtype: torch.dtype) -> None:
    weight, inputs, bias = torch.randn(48, 64) * 0.1, outlying().to(dtype), torch.randn(48).to(dtype)
    output = int8(weight, threshold=threshold).linear(inputs, bias)
    expected = torch.stack([naive_product(sequence, weight, threshold) for sequence in inputs]) + bias.double()
    assert output.dtype == dtype
    close = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]  # a tie may round either way
    assert (output - expected).norm() <= close * expected.norm()


def test_int8_is_near_the_rounding_of_the_scheme_and_far_from_one_without_a_threshold() -> None:
    weight, inputs = torch.randn(48, 64) * 0.1, outlying()
    fmt, token_scheme = scheme("llm_int8"), scheme("w8a8_token")
    assert fmt.activation is not None
    assert token_scheme.activation is not None
    decoded = round_to_nearest(weight, fmt.format).dequantize()
    with_threshold = InputQuantizer(fmt.activation)(inputs) @ decoded.T
    without_threshold = InputQuantizer(token_scheme.activation)(inputs) @ decoded.T
    output = int8(weight).linear(inputs, None)
    assert (output - with_threshold).norm() <= 0.005 * with_threshold.norm()
    assert (output - with_threshold).norm() <= 0.3 * (output - without_threshold).norm()


def test_int8_does_not_depend_on_the_batch_and_takes_any_leading_shape() -> None:
    quantized, inputs = int8(torch.randn(48, 64)), outlying()
    output = quantized.linear(inputs, None)
    assert torch.equal(output[1], quantized.linear(inputs[1], None))
    assert torch.equal(output[1, 1], quantized.linear(inputs[1:2], None)[0, 1])
    assert torch.equal(quantized.linear(inputs[0, 0], None), quantized.linear(inputs[:1, :1], None)[0, 0])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("method", [BnbNF4, BnbFP4])
def test_four_bits_decode_as_level_times_scale_of_the_block(method: type[Bnb4Bit], double_quant: bool) -> None:
    weight = torch.randn(40, 128) * torch.rand(40, 1).mul(3).exp()
    qtensor = four_bit(method(), weight, double_quant=double_quant)
    levels = torch.tensor(LEVELS[qtensor.quant_type], dtype=torch.float64)
    # bitsandbytes stores fp4's smallest level with 4 digits.
    torch.testing.assert_close(qtensor.code.double(), levels, rtol=0, atol=1e-4)
    high, low = qtensor.qweight.flatten() >> 4, qtensor.qweight.flatten() & 15
    codes = torch.stack([high, low], 1).view(-1, 64).long()
    scale, exact = qtensor.absmax.double(), weight.view(-1, 64).double().abs().amax(1)
    if double_quant:
        assert qtensor.nested_code is not None
        assert qtensor.nested_absmax is not None
        assert qtensor.offset is not None
        scale = (
            qtensor.nested_code.double()[qtensor.absmax.long()] * qtensor.nested_absmax.double()
            + qtensor.offset.double()
        )
    assert (scale - exact).norm() <= (0.02 if double_quant else 0) * exact.norm()
    decoded = qtensor.code.double()[codes] * scale[:, None]
    torch.testing.assert_close(qtensor.dequantize().double(), decoded.view(40, 128), rtol=1e-6, atol=1e-7)
    if not double_quant:  # and each code is the nearest
        nearest = (weight.view(-1, 64, 1).double() / exact[:, None, None] - levels).abs().amin(2)
        assert ((weight.view(-1, 64) - decoded).abs() / exact[:, None] - nearest).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bits_multiply_as_they_decode(dtype: torch.dtype) -> None:
    qtensor = four_bit(BnbNF4(), torch.randn(48, 64).to(dtype))
    inputs, bias = torch.randn(2, 5, 64).to(dtype), torch.randn(48).to(dtype)
    expected = inputs @ qtensor.dequantize(dtype).T + bias
    torch.testing.assert_close(qtensor.linear(inputs, bias), expected, rtol=2e-2, atol=2e-2)
    assert qtensor.dequantize(torch.float64).dtype == torch.float64


def test_bits_are_counted_from_what_is_stored() -> None:
    rows, columns = 1024, 2048
    weight = torch.randn(rows, columns)
    books = (16 + 256 + 1) * 32  # both codebooks and the offset
    assert four_bit(BnbNF4(), weight).stored_bits == rows * columns * (4 + 8 / 64 + 32 / (64 * 256)) + books
    assert four_bit(BnbNF4(), weight).bits_per_weight == pytest.approx(4.127, abs=5e-3)
    assert four_bit(BnbFP4(), weight, double_quant=False).bits_per_weight == pytest.approx(4.5, abs=1e-3)
    assert int8(weight).stored_bits == 8 * rows * columns + 32 * rows


@pytest.mark.parametrize("method", [BnbInt8(), BnbNF4(), BnbFP4()])
def test_a_copy_and_a_move_include_all_tensors(method: BnbInt8 | Bnb4Bit) -> None:
    weight, inputs = torch.randn(48, 64), outlying()
    linear = QuantLinear(method.quantize(weight, scheme_of(method), Stats()), None, torch.float32).pack()
    expected, copied = linear(inputs), copy.deepcopy(linear)
    linear.to("meta")
    assert all(buffer.device.type == "meta" for buffer in linear.buffers())
    assert all(not isinstance(value, Tensor) for value in vars(linear.packed).values())
    assert torch.equal(copied(inputs), expected)


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        (BnbInt8(), "group64", "scheme=group64 is not the format of bitsandbytes, .*; use scheme=llm_int8"),
        (BnbInt8(), "w8a8_tensor", "use scheme=llm_int8"),
        (
            BnbInt8(threshold=5.0),
            "llm_int8",
            "threshold=5 differs from scheme.activation.threshold=6.0; set both to one value",
        ),
        (BnbInt8(), "w8a8_token", "threshold=6 differs from scheme.activation.threshold=None"),
        (BnbNF4(), "group64", "scheme=group64 is another format than the nf4 blocks .*; use scheme=nf4"),
    ],
)
def test_other_formats_are_refused(method: BnbInt8 | Bnb4Bit, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.check(scheme(name))


def test_schemes_and_options_of_peers() -> None:
    BnbInt8().check(scheme("llm_int8"))
    BnbInt8(threshold=0).check(scheme("w8a8_token"))
    BnbFP4().check(scheme("fp4"))
    for options in ({"threshold": -1.0}, {"threshold": float("nan")}):
        with pytest.raises(ValueError, match="is out of range; expected 0 or more"):
            BnbInt8(**options)
    with pytest.raises(ValueError, match="scheme.weight.group_size=48 is unknown to bitsandbytes; expected one of"):
        BnbNF4().check(blocks(BnbNF4(), group_size=48))
    with pytest.raises(ValueError, match="group_size=64 does not divide in_features=96, and on CPUs with AVX-512"):
        four_bit(BnbNF4(), torch.randn(4, 96))
    for method in (BnbInt8(), BnbNF4()):
        with pytest.raises(ValueError, match="the weight is float64, .*; use model.dtype=float32"):
            method.quantize(torch.randn(4, 64, dtype=torch.float64), scheme_of(method), Stats())


@pytest.mark.parametrize("method", [BnbInt8(), BnbNF4(), BnbFP4()])
def test_missing_library_is_named_with_its_remedy(method: BnbInt8 | Bnb4Bit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"^bitsandbytes cannot be imported .*; install ptqbench\[peers\]$"):
        method.check(scheme_of(method))


def test_a_method_chooses_its_scheme_and_the_command_line_wins(tiny: Callable[..., dict[str, Any]]) -> None:
    assert resolve("method=bnb_nf4")["scheme"]["name"] == "nf4"
    assert resolve("method=bnb_int8")["scheme"]["name"] == "llm_int8"
    assert resolve("method=bnb_nf4", "scheme=group32")["scheme"]["name"] == "group32"
    for overrides, message in (
        (("method=bnb_nf4", "scheme=group32"), "method.bnb_nf4: scheme=group32 is another format"),
        (("method=bnb_fp4", "bits=3"), "scheme.weight.bits=3 does not match table=fp4; expected bits=4"),
        (("method=rtn", "scheme=none"), "method.rtn: scheme=none leaves the format of weights to the method"),
    ):
        record = execute_run(tiny(*overrides))[0]
        assert record.status == "failed"
        assert str(record.error).startswith(message)


def test_peers_run_in_a_sweep(command: Callable[..., Done], tmp_path: Any) -> None:
    done = command("-m", *TINY, "measure=off", f"results_dir={tmp_path}", "method=rtn,bnb_nf4,bnb_int8")
    assert done.returncode == 0, done.stderr
    assert [name in done.stdout for name in ("rtn", "bnb_nf4", "bnb_int8")] == [True] * 3
    assert "inputs will be cast" not in done.stderr
