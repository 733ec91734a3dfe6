"""FP8 weights and inputs by `torch._scaled_mm`: on a CPU, and by a stand-in with the demands of the one on a GPU.

Expected are float64 products of the decoded weight with the decoded inputs, which are not rounded to 16 bits: the
errors are those of one rounding of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.core import FloatActivation, FloatQTensor, FloatWeight, IntActivation, round_to_nearest
from harness.core.formats import InputQuantizer
from harness.core.formats.elements import element
from harness.kernels import scaled_mm
from harness.kernels.scaled_mm import ScaledMM, supports
from harness.kernels.table import choose
from harness.nn import QuantLinear
from tests.support.kernels import error

BOUNDS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}
INPUTS: dict[str, dict[str, Any]] = {
    "token": {},
    "token mse": {"scale_search": "mse"},
    "clip": {"clip": 0.8},
    "tensor": {"granularity": "tensor"},
    "static": {"granularity": "tensor", "dynamic": False},
    "e8m0": {"scale_dtype": "e8m0"},
}
WEIGHTS: dict[str, dict[str, Any]] = {"channel": {}, "tensor": {"granularity": "tensor", "scale_dtype": "bfloat16"}}
SHAPES = ((5, 64), (1, 64), (1, 1, 64), (1, 7, 64), (3, 4, 64), (2, 3, 2, 64))


def fp8_weight(kind: str, N: int = 48, K: int = 64) -> FloatQTensor:
    """Rows of very different magnitude, one of them zeros."""
    weight = torch.randn(N, K) * torch.rand(N, 1).mul(6).exp() * 1e-3
    weight[3] = 0
    quantized = round_to_nearest(weight, FloatWeight(element="e4m3", **WEIGHTS[kind]))
    assert isinstance(quantized, FloatQTensor)
    return quantized


def quantizer(kind: str) -> InputQuantizer:
    fmt = FloatActivation(element="e4m3", **INPUTS[kind])
    return InputQuantizer(fmt, None if fmt.dynamic else (torch.tensor(-2.0), torch.tensor(3.0)))


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Tokens of very different magnitude, with zeros and an outlier."""
    inputs = torch.randn(shape) * torch.rand(*shape[:-1], 1).mul(4).exp() * 0.1
    inputs.view(-1)[:5] = 0
    inputs.view(-1)[-9] = 40.0
    return inputs.to(dtype)


def fits(weights: str, inputs: str, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 or (weights == "tensor" and INPUTS[inputs].get("granularity") == "tensor")


COMBINATIONS = [
    (weights, inputs, dtype)
    for weights in WEIGHTS
    for inputs in INPUTS
    for dtype in BOUNDS
    if fits(weights, inputs, dtype)
]
combinations = pytest.mark.parametrize(("weights", "inputs", "dtype"), COMBINATIONS)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that multiplies 8-bit floats."""
    monkeypatch.setattr(scaled_mm, "capable", lambda device: True)


@pytest.fixture
def gpu(able: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`torch._scaled_mm` with what torch documents for GPUs, in float64. Yields the kinds of its scales."""
    calls = list[str]()

    def product(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype,
        use_fast_accum: bool,
    ) -> Tensor:  # fmt: skip
        (M, K), (inner, N) = a.shape, b.shape
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous()
        assert b.t().is_contiguous()  # column-major
        assert inner == K
        assert K % 16 == N % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert not use_fast_accum
        if scale_a.numel() == scale_b.numel() == 1:
            calls.append("tensorwise")
        else:
            assert scale_a.shape == (M, 1)
            assert scale_b.shape == (1, N)
            assert scale_a.stride(1) == scale_b.stride(1) == 1
            assert out_dtype == torch.bfloat16
            calls.append("rowwise")
        y = (a.double() * scale_a.double()) @ (b.double() * scale_b.double())
        if bias is not None:
            assert bias.dtype == out_dtype != torch.float32
            y = y + bias.double()
        return y.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    yield calls
    assert calls


def check(weights: str, inputs: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, rounds = fp8_weight(weights), quantizer(inputs)
    kernel = ScaledMM(weight, rounds, dtype)
    x, bias = random_inputs(shape, dtype), torch.randn(48).to(dtype)
    y = kernel(x, bias)
    expected = rounds(x.float()).double() @ weight.dequantize(torch.float64).t() + bias.double()
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert error(y, expected) < BOUNDS[dtype]
    small = x.float().abs().amax(-1) < 10  # the outlier hides errors of all other tokens
    assert not small.any() or error(y[small], expected[small]) < BOUNDS[dtype]
    assert torch.equal(kernel(x, None), kernel(x, torch.zeros(48).to(dtype)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@combinations
def test_the_product_of_a_cpu(
    able: None, weights: str, inputs: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    check(weights, inputs, dtype, shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@combinations
def test_what_a_gpu_demands(
    gpu: list[str], weights: str, inputs: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    check(weights, inputs, dtype, shape)


def test_one_scale_each_is_tensorwise_and_sequences_are_apart(gpu: list[str]) -> None:
    one, several = random_inputs((1, 7, 64), torch.float16), random_inputs((3, 7, 64), torch.float16)
    kernel = ScaledMM(fp8_weight("tensor"), quantizer("tensor"), torch.float16)
    kernel(one, None)
    assert gpu == ["tensorwise"]
    outputs = kernel(several, None)
    assert gpu == ["tensorwise"] * 4
    assert torch.equal(outputs, torch.cat([kernel(sequence[None], None) for sequence in several]))
    del gpu[:]
    kernel = ScaledMM(fp8_weight("tensor"), quantizer("tensor"), torch.bfloat16)
    kernel(several.bfloat16(), None)
    kernel(several[:1].bfloat16(), None)
    assert gpu == ["rowwise", "tensorwise"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_codes_are_those_of_the_simulated_format(kind: str, dtype: torch.dtype) -> None:
    rounds, x = quantizer(kind), random_inputs((3, 5, 64), dtype)
    codes, scale = rounds.encode(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.float() * scale, rounds(x.float()))
    assert len(codes.view(torch.uint8).unique()) > 100


@pytest.mark.parametrize("kind", [kind for kind in INPUTS if kind != "token mse"])
def test_a_call_does_not_wait_for_a_gpu(kind: str, gpu: list[str]) -> None:
    """Fake tensors refuse every operator whose result Python reads, as the capture of a CUDA graph does."""
    kernel = ScaledMM(fp8_weight("tensor"), quantizer(kind), torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kernel(torch.empty(3, 5, 64, dtype=torch.bfloat16), None).shape == (3, 5, 48)


def test_a_compiled_model_has_the_same_bits(able: None) -> None:
    kernel = ScaledMM(fp8_weight("channel"), quantizer("token"), torch.bfloat16)
    x = random_inputs((2, 5, 64), torch.bfloat16)
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, None), kernel(x, None))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_a_cast_rounds_as_the_format_does(name: str) -> None:
    """All float16 numbers, and the neighbours of every tie."""
    kind, halves = element(name), torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).float()
    levels = kind.levels[kind.levels.isfinite()].sort().values
    ties = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([halves[halves.isfinite()], ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1)])
    assert torch.equal(kind.cast(values.clone()).view(torch.uint8), kind.encode(kind.round_(values.clone())))
    assert kind.cast(torch.tensor([torch.nan])).float().isnan()


def test_what_is_supported(able: None) -> None:
    weight, tokens = fp8_weight("channel"), quantizer("token")
    assert supports(weight, tokens, torch.bfloat16)
    assert not supports(weight, tokens, torch.float16)  # rowwise outputs are bfloat16
    assert not supports(weight, quantizer("static"), torch.float32)
    assert not supports(fp8_weight("tensor"), tokens, torch.float16)
    assert supports(fp8_weight("tensor"), quantizer("tensor"), torch.float16)
    assert not supports(fp8_weight("channel", 40), tokens, torch.bfloat16)
    assert not supports(fp8_weight("channel", 48, 72), tokens, torch.bfloat16)
    groups = FloatActivation(element="e4m3", granularity="group", group_size=32)
    others = (groups, FloatActivation(element="e5m2"), FloatActivation(element="e4m3", threshold=6.0))
    for fmt in (*others, IntActivation(bits=8, symmetric=True)):
        assert not supports(weight, InputQuantizer(fmt), torch.bfloat16)
    for options in (
        {"element": "e5m2"},
        {"granularity": "group", "group_size": 32},
        {"granularity": "block", "group_size": 64},
    ):
        quantized = round_to_nearest(torch.randn(96, 64), FloatWeight(**{"element": "e4m3", **options}))
        assert isinstance(quantized, FloatQTensor)
        assert not supports(quantized, tokens, torch.bfloat16)
    with pytest.raises(ValueError, match="kernel=scaled_mm does not support .* in torch.float16 on cpu; expected E4M3"):
        ScaledMM(weight, tokens, torch.float16)


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "triton_e4m3"), ((8, 9), "scaled_mm"), ((9, 0), "scaled_mm")]
)
def test_the_capability_of_the_device_decides(
    capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not scaled_mm.capable(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = scaled_mm.capable(torch.device("cuda", 0))
    assert found == (name == "scaled_mm")
    monkeypatch.setattr(scaled_mm, "capable", lambda device: found)
    kernel = choose(fp8_weight("channel"), quantizer("token"), torch.bfloat16, torch.device("cuda"))
    assert kernel is not None
    assert kernel.name == name
    assert kernel.quantizes_inputs == found


def test_a_linear_computes_what_it_simulates(able: None) -> None:
    weight, rounds = fp8_weight("channel"), quantizer("token")
    packed = QuantLinear(weight, torch.randn(48).bfloat16(), torch.bfloat16, rounds)
    simulated = QuantLinear(weight, packed.bias, torch.bfloat16, rounds).simulate()
    packed.packed = ScaledMM(weight, rounds, torch.bfloat16)
    packed.decoded = None
    x = random_inputs((2, 5, 64), torch.bfloat16)
    assert packed.kernel == "scaled_mm"
    assert packed.quantizes_inputs
    assert error(packed(x), simulated(x).double()) < 3 * 2.0**-8  # simulated inputs and weights are rounded to bfloat16
    assert packed(x[:, :0]).shape == (2, 0, 48)
