"""The weight-only matmul of small floats in Triton's interpreter, against float64 of the decoded weight.

Bounds are those of test_w4a16.py. Scaling before the dot rounds a weight only if its scale has a long mantissa: powers
of two and E4M3 scales keep the bound of one rounding on every path.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from harness.core import FloatQTensor, FloatWeight, round_to_nearest
from harness.core.formats import Params
from harness.core.formats.elements import element
from harness.kernels.table import choose
from harness.kernels.triton import decode, small_floats, tune
from harness.kernels.triton.small_floats import TritonFloat, supports
from harness.kernels.triton.tune import Config
from harness.kernels.triton.weight_only import dequantize, matmul, weight_only_linear
from tests.support.kernels import error, exact

BOUNDS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
PATHS = {
    "split": Config(64, 16, 1, path="split"),
    "parts": Config(64, 16, 3, path="split"),
    "tensor": Config(128, 32, 1, path="tensor"),
    "dequantize": Config(path="dequantize"),
}
MXFP4 = FloatWeight(element="e2m1", granularity="group", group_size=32, scale_dtype="e8m0")
NVFP4 = FloatWeight(element="e2m1", granularity="group", group_size=16, scale_dtype="e4m3", tensor_scale=True)
FORMATS = {
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "e2m1 rows": FloatWeight(element="e2m1"),
    "mxfp6": FloatWeight(element="e2m3", granularity="group", group_size=32, scale_dtype="e8m0"),
    "e3m2": FloatWeight(element="e3m2", granularity="group", group_size=48, scale_dtype="bfloat16"),
    "mxfp8": FloatWeight(element="e4m3", granularity="group", group_size=32, scale_dtype="e8m0"),
    "e5m2": FloatWeight(element="e5m2", granularity="group", group_size=32, scale_dtype="e8m0"),
    "fp8 rows": FloatWeight(element="e4m3"),
    "fp8 tensor": FloatWeight(element="e4m3", granularity="tensor", scale_dtype="bfloat16"),
    "fp8 blocks": FloatWeight(element="e4m3", granularity="block", group_size=32),
}
SHAPES = {"mxfp4": (100, 96), "nvfp4": (70, 112), "e3m2": (66, 144), "fp8 blocks": (70, 96), "fp8 tensor": (70, 100)}


def random_weight(fmt: FloatWeight, N: int, K: int) -> FloatQTensor:
    """Every code that is a number, with a different scale in every group, in 8 powers of two; values reach about 2."""
    finite = fmt.kind.levels.isfinite().nonzero().flatten().to(torch.uint8)
    codes = finite[torch.arange(N * K) % len(finite)][torch.randperm(N * K)].view(N, K)
    shape = fmt.groups((N, K))
    exponents = torch.rand(shape) * 8 - 7 - (0 if fmt.tensor_scale else fmt.kind.largest_exponent)
    scale = torch.exp2(exponents.round() if fmt.scale_dtype == "e8m0" else exponents)
    whole = torch.tensor(0.0123) if fmt.tensor_scale else None
    return FloatQTensor(codes, Params(scale, whole=whole), fmt)


def run(weight: FloatQTensor, x: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    return matmul(x, TritonFloat(weight, x.dtype).weight(), bias, config)


def rounds_weights(weight: FloatQTensor, config: Config) -> bool:
    grouped = weight.scale.shape[1] > 1 and weight.fmt.scale_dtype not in ("e8m0", "e4m3")
    return config.path == "dequantize" or (config.path == "tensor" and grouped)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("name", FORMATS)
def test_each_path_multiplies(name: str, dtype: torch.dtype, path: str) -> None:
    N, K = SHAPES.get(name, (65, 160))
    weight = random_weight(FORMATS[name], N, K)
    for M in (1, 17):
        x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
        y = run(weight, x, bias, PATHS[path])
        assert y.shape == (M, N)
        assert y.dtype == dtype
        bound = BOUNDS[dtype] * (3 if rounds_weights(weight, PATHS[path]) else 1)
        assert error(y, exact(weight, x, bias)) < bound


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_weights_are_those_of_the_reference(name: str) -> None:
    weight = random_weight(FORMATS[name], *SHAPES.get(name, (65, 160)))
    decoded = dequantize(TritonFloat(weight, torch.bfloat16).weight(), torch.float32)
    assert torch.equal(decoded, weight.dequantize())
    assert len(decoded.unique()) > 30  # every code, with many scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("name", FORMATS)
def test_each_code_is_exact_in_a_dot(name: str, dtype: torch.dtype) -> None:
    """With inputs that select one column each, outputs are elements, to the bit, whatever the other codes are."""
    fmt, K = FORMATS[name], 96 if FORMATS[name].group_size != 48 else 144
    weight = random_weight(fmt, 64, K)
    scale = torch.ones(fmt.groups((64, K)))
    plain = FloatQTensor(weight.codes, Params(scale, whole=torch.tensor(1.0) if fmt.tensor_scale else None), fmt)
    for path in ("split", "tensor"):
        y = run(plain, torch.eye(K).to(dtype), None, PATHS[path])
        assert torch.equal(y.t().float(), plain.dequantize())


def evaluated(assembly: str, word: int) -> int:
    """What the assembly of `decode` makes of a register with two 16-bit words."""
    registers = {"$1": word}
    operations = {"shl": lambda a, b: a << b, "shr": lambda a, b: a >> b, "and": lambda a, b: a & b}
    for line in assembly.strip("{ }").split(";"):
        name, _, text = line.strip().partition(" ")
        target, *operands = text.split(", ")
        values = [registers[text] if text in registers else int(text, 0) for text in operands if name[0] != "."]
        if name.startswith("lop3"):
            assert values[3] == 0xEA
            registers[target] = values[0] & values[1] | values[2]
        elif name and name[0] != ".":
            registers[target] = operations[name.partition(".")[0]](*values) & 0xFFFFFFFF
    return registers["$0"]


@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.float16, 10), (torch.bfloat16, 7)], ids=("fp16", "bf16"))
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2"])
def test_the_assembly_moves_each_code_to_its_float(name: str, dtype: torch.dtype, mantissa: int) -> None:
    """Each code in each place of both words, with other codes around it, which must not leak."""
    kind = element(name)
    lift, mask = mantissa - kind.mantissa, ((1 << kind.bits - 1) - 1 << mantissa - kind.mantissa) & 0x7FFF
    factor = 2.0 ** ((15 if dtype == torch.float16 else 127) - kind.bias)
    for shift in range(0, 16, kind.bits):
        assembly = decode._float_field.fn(shift, kind.bits, lift, mask)
        for code in kind.levels.isfinite().nonzero().flatten().tolist():
            for around in (0, 0xFFFF, 0x5A5A):
                word = around & ~((1 << kind.bits) - 1 << shift) | code << shift
                outcome = evaluated(assembly, word << 16 | around) >> 16, evaluated(assembly, around << 16 | word)
                for half in (outcome[0], outcome[1] & 0xFFFF):
                    bits = torch.tensor(half, dtype=torch.int32).to(torch.int16)
                    assert float(bits.view(dtype)) * factor == float(kind.levels[code])


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=("mxfp4", "nvfp4"))
def test_zeros_an_outlier_and_dead_groups(fmt: FloatWeight) -> None:
    """A group of zeros has the smallest scale of all, 2^-127 in E8M0; one outlier sets the scale of the tensor."""
    weight = torch.randn(64, 96) * 0.02
    weight[:, 32:64] = 0
    weight[3, 5] = 30.0
    quantized = round_to_nearest(weight, fmt)
    assert supports(quantized, torch.float16)
    for dtype, path in itertools.product(BOUNDS, PATHS):
        x = torch.randn(3, 96).to(dtype)
        y = run(quantized, x, None, PATHS[path])
        bound = BOUNDS[dtype] * (3 if path == "dequantize" else 1)
        assert error(y, exact(quantized, x)) < bound
        kept = torch.arange(64) != 3  # the outlier hides errors of all other rows
        assert error(y[:, kept], exact(quantized, x)[:, kept]) < bound


def test_extreme_powers_of_two() -> None:
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    scale = torch.exp2(torch.tensor([[-127.0, 100.0]])).repeat(64, 1)
    weight = FloatQTensor(codes, Params(scale), MXFP4)
    assert torch.equal(dequantize(TritonFloat(weight, torch.bfloat16).weight(), torch.float32), weight.dequantize())


def test_the_module_names_its_element_and_keeps_what_is_stored() -> None:
    for fmt, name in ((MXFP4, "triton_e2m1"), (NVFP4, "triton_e2m1"), (FORMATS["mxfp8"], "triton_e4m3")):
        weight = random_weight(fmt, 64, 256)
        kernel = TritonFloat(weight, torch.bfloat16)
        assert kernel.name == name
        assert 8 * sum(buffer.nbytes for buffer in kernel.buffers()) == weight.stored_bits
        assert kernel(torch.randn(2, 3, 256).bfloat16(), None).shape == (2, 3, 64)
        assert kernel(torch.randn(2, 0, 256).bfloat16(), None).shape == (2, 0, 64)


def test_what_is_supported() -> None:
    assert not supports(random_weight(MXFP4, 64, 96), torch.float32)
    odd = FloatWeight(element="e2m1", granularity="group", group_size=24)
    assert not supports(random_weight(odd, 64, 96), torch.bfloat16)
    cut = FloatWeight(element="e4m3", granularity="block", group_size=64)
    assert supports(random_weight(cut, 100, 128), torch.bfloat16)
    assert not supports(random_weight(cut, 100, 96), torch.bfloat16)  # the last block has half of the inputs
    assert supports(random_weight(cut, 100, 40), torch.bfloat16)
    wide = FloatWeight(element="e5m1")  # its largest value is above that of float16
    assert not supports(random_weight(wide, 64, 96), torch.bfloat16)
    with pytest.raises(ValueError, match="element=e2m1 in groups of 24 with torch.bfloat16"):
        TritonFloat(random_weight(odd, 64, 96), torch.bfloat16)


@pytest.mark.parametrize(
    ("scale_dtype", "scale", "supported"),
    [
        ("e8m0", 2.0**-24, True),
        ("e8m0", 2.0**-26, False),
        ("e8m0", 2.0**-30, True),  # all weights are 0 in float16
        ("e8m0", 2.0**14, False),  # 6 times it is above the largest float16
        ("float32", 2.0**-14, True),
        ("float32", 2.0**-15, False),
    ],
)
def test_float16_holds_the_scales_of_groups(scale_dtype: str, scale: float, supported: bool) -> None:
    fmt = FloatWeight(element="e2m1", granularity="group", group_size=32, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    scales = torch.full((64, 3), 0.25)
    scales[5, 1] = scale
    weight = FloatQTensor(torch.randint(0, 16, (64, 96), dtype=torch.uint8), Params(scales), fmt)
    assert supports(weight, torch.float16) == supported
    assert supports(weight, torch.bfloat16)
    rows = FloatWeight(element="e2m1", scale_dtype=scale_dtype)  # type: ignore[arg-type]
    assert supports(FloatQTensor(weight.codes, Params(scales.amin(1, keepdim=True)), rows), torch.float16)


def test_the_table_of_a_gpu_has_small_floats() -> None:
    cuda = torch.device("cuda")
    for fmt, name in ((MXFP4, "triton_e2m1"), (FORMATS["fp8 rows"], "triton_e4m3"), (FORMATS["mxfp6"], "triton_e2m3")):
        kernel = choose(random_weight(fmt, 64, 96), None, torch.bfloat16, cuda)
        assert kernel is not None
        assert kernel.name == name
        assert choose(random_weight(fmt, 64, 96), None, torch.float32, cuda) is None


def test_the_operator_keeps_torchs_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "read_cache", lambda: {})
    for name, group_size, tests in (
        ("e2m1 rows", 96, ("test_schema", "test_faketensor")),
        ("nvfp4", 16, ("test_faketensor",)),  # torch's test of schemas has no arithmetic for 8-bit floats
    ):
        kernel = TritonFloat(random_weight(FORMATS[name], 70, 96), torch.float16)
        buffers = (kernel.packed, kernel.scale, None, kernel.tensor_scale)
        arguments = (torch.randn(3, 96).half(), *buffers, torch.randn(70).half(), 70, "e2m1", group_size)
        torch.library.opcheck(weight_only_linear, arguments, test_utils=tests)


def test_a_compiled_model_calls_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "read_cache", lambda: {})
    kernel, x = TritonFloat(random_weight(MXFP4, 64, 128), torch.float16), torch.randn(3, 128).half()
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, None), kernel(x, None))


def test_every_case_names_each_argument_once() -> None:
    for case in small_floats.cases():
        assert list(case.signature) == list(case.kernel.arg_names)
        assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)
    assert len({case.name for case in small_floats.cases()}) == len(small_floats.cases())
