"""The weight-only matmul in Triton's interpreter, against float64 arithmetic on the same rounded operands.

Bounds. A path with fp32 sums rounds its result once to 16 bits, which changes each value by at most 2^-11 in fp16.
If weights are scaled before the dot, the scale and the scaled weights are also rounded to 16 bits: the bound is three
times as large. The interpreter truncates to bf16 instead of rounding, which changes a value by up to 2^-7, and it
computes bf16 products in fp32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.core import IntQTensor, IntWeight
from harness.core.formats import Params
from harness.kernels.triton import tune, w4a16, weight_only
from harness.kernels.triton.tune import Config
from harness.kernels.triton.w4a16 import TritonInt, supports
from harness.kernels.triton.weight_only import dequantize, matmul, weight_only_linear

BOUNDS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
SPLIT = Config(64, 16, 1, path="split")
PARTS = Config(64, 16, 3, path="split")
TENSOR = Config(128, 32, 1, path="tensor")
DEQUANTIZE = Config(path="dequantize")
PATHS = (SPLIT, PARTS, TENSOR, DEQUANTIZE)


def random_weight(N: int, K: int, group_size: int = -1, kind: str = "integer", bits: int = 4) -> IntQTensor:
    """Random codes, with a different scale and zero point in every group."""
    zero_point = "float" if kind == "float" else "integer"
    fmt = IntWeight(
        bits=bits, symmetric=kind == "none", zero_point=zero_point, granularity="group", group_size=group_size
    )
    shape = fmt.groups((N, K))
    codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
    scale = (torch.rand(shape) * 0.05 + 0.001).half().float()
    zeros = {
        "none": None,
        "integer": torch.randint(0, 1 << bits, shape).float(),
        "float": (torch.rand(shape) * (1 << bits)).half().float(),
    }[kind]
    return IntQTensor(codes, Params(scale, zeros), fmt)


def run(kernel: TritonInt, x: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    return matmul(x, kernel.weight(), bias, config)


def error(y: Tensor, weight: IntQTensor, x: Tensor, bias: Tensor | None = None) -> float:
    """Relative Frobenius error of y."""
    exact = x.double() @ weight.dequantize(torch.float64).T
    exact = exact if bias is None else exact + bias.double()
    return float((y.double() - exact).norm() / exact.norm())


def bound(config: Config, dtype: torch.dtype, kind: str) -> float:
    scaled_after = config.path == "split" and kind != "float"
    return BOUNDS[dtype] * (1 if scaled_after else 3)


@pytest.mark.parametrize("config", PATHS, ids=("split", "parts", "tensor", "dequantize"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("fp16", "bf16"))
@pytest.mark.parametrize(
    ("N", "K", "group_size", "kind", "bits", "M"),
    [
        (64, 256, 128, "integer", 4, 1),
        (64, 256, 64, "float", 4, 3),
        (100, 96, 32, "integer", 4, 17),
        (100, 96, -1, "float", 4, 3),
        (128, 512, 128, "none", 4, 3),
        (70, 100, -1, "none", 4, 3),
        (66, 144, 48, "integer", 4, 3),
        (130, 256, 64, "integer", 8, 3),
        (70, 96, 32, "float", 8, 3),
        (65, 100, -1, "none", 8, 17),
    ],
)
def test_each_path_multiplies(
    N: int, K: int, group_size: int, kind: str, bits: int, M: int, dtype: torch.dtype, config: Config
) -> None:
    weight = random_weight(N, K, group_size, kind, bits)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    y = run(TritonInt(weight, dtype), x, bias, config)
    assert y.shape == (M, N)
    assert y.dtype == dtype
    assert error(y, weight, x, bias) < bound(config, dtype, kind)


@pytest.mark.parametrize(("N", "K", "group_size", "M"), [(576, 576, 64, 3), (192, 1536, 128, 65), (576, 192, -1, 64)])
def test_shapes_of_small_models(N: int, K: int, group_size: int, M: int) -> None:
    weight = random_weight(N, K, group_size)
    x = torch.randn(M, K).half()
    assert error(TritonInt(weight, torch.float16)(x, None), weight, x) < 3 * BOUNDS[torch.float16]


@pytest.mark.parametrize("kind", ["none", "integer", "float"])
@pytest.mark.parametrize(("N", "K", "group_size", "bits"), [(70, 96, 32, 4), (64, 100, -1, 8)])
def test_dequantized_weights_are_those_of_the_reference(N: int, K: int, group_size: int, bits: int, kind: str) -> None:
    weight = random_weight(N, K, group_size, kind, bits)
    kernel = TritonInt(weight, torch.float16)
    for dtype in (torch.float32, torch.float16):
        decoded = dequantize(kernel.weight(), dtype)
        assert torch.equal(decoded, weight.dequantize(dtype))


@pytest.mark.parametrize("config", [SPLIT, TENSOR], ids=("split", "tensor"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=("fp16", "bf16"))
def test_large_constant_inputs_cancel_exactly(dtype: torch.dtype, config: Config) -> None:
    """If the codes still contained the offset 1024 in the dot, the sums would be thousands of times the result."""
    codes = torch.tensor([7, 9], dtype=torch.uint8).repeat(64, 64)  # symmetric about the zero point 8: every sum is 0
    codes[:, 0] = 10  # except for this code, 3 steps above the 7 that it replaces
    fmt = IntWeight(bits=4, granularity="group", group_size=64)
    scale = (torch.rand(64, 2) * 0.05 + 0.01).half().float()
    weight = IntQTensor(codes, Params(scale, torch.full((64, 2), 8.0)), fmt)
    x = torch.full((2, 128), 512.0).to(dtype)
    y = run(TritonInt(weight, dtype), x, None, config)
    assert error(y, weight, x) < bound(config, dtype, "integer")


@pytest.mark.parametrize("config", PATHS, ids=("split", "parts", "tensor", "dequantize"))
def test_the_same_inputs_give_the_same_bits(config: Config) -> None:
    kernel, x = TritonInt(random_weight(64, 384, 64), torch.float16), torch.randn(5, 384).half()
    assert torch.equal(run(kernel, x, None, config), run(kernel, x, None, config))
    rows = torch.cat([run(kernel, x[i : i + 1], None, config) for i in range(5)])
    if config.path != "dequantize":
        assert torch.equal(run(kernel, x, None, config), rows)


def test_more_parts_than_blocks_of_k_add_zeros() -> None:
    weight, x = random_weight(64, 128, 64), torch.randn(2, 128).half()
    config = Config(64, 16, 4, path="split")
    assert error(run(TritonInt(weight, torch.float16), x, None, config), weight, x) < BOUNDS[torch.float16]


def test_the_module_takes_any_leading_shape_and_counts_its_bits() -> None:
    weight = random_weight(64, 256, 128)
    kernel = TritonInt(weight, torch.float16)
    x = torch.randn(2, 3, 256).half()
    assert kernel.name == "triton_w4a16"
    assert kernel(x, None).shape == (2, 3, 64)
    assert kernel(x[:, :0], None).shape == (2, 0, 64)
    assert 8 * sum(buffer.nbytes for buffer in kernel.buffers()) == weight.stored_bits


def test_a_scale_of_the_whole_tensor() -> None:
    fmt = IntWeight(bits=8, symmetric=True, granularity="tensor")
    codes = torch.randint(0, 256, (20, 40), dtype=torch.uint8)
    weight = IntQTensor(codes, Params(torch.tensor([[0.5]])), fmt)
    kernel, x = TritonInt(weight, torch.float16), torch.randn(2, 40).half()
    assert kernel.name == "triton_w8a16"
    assert error(kernel(x, None), weight, x) < BOUNDS[torch.float16]


def test_what_is_supported() -> None:
    weight = random_weight(64, 96, 32)
    assert supports(weight, torch.bfloat16)
    assert not supports(weight, torch.float32)
    assert not supports(random_weight(64, 96, 32, bits=3), torch.float16)
    assert not supports(random_weight(64, 96, 24), torch.float16)
    small = random_weight(64, 96, 32)
    small.register_buffer("scale", torch.full_like(small.scale, 1e-7, dtype=torch.float32))
    assert supports(small, torch.bfloat16)
    assert not supports(small, torch.float16)  # it multiplies by scales in float16
    with pytest.raises(ValueError, match="groups of 24 with torch.float16"):
        TritonInt(random_weight(64, 96, 24), torch.float16)


def test_the_operator_keeps_torchs_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "read_cache", lambda: {})
    kernel = TritonInt(random_weight(70, 96, 32), torch.float16)
    arguments = (kernel.packed, kernel.scale, kernel.zero_point, None, torch.randn(70).half(), 70, "int4", 32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(weight_only_linear, (torch.randn(3, 96).half(), *arguments), test_utils=tests)


def test_a_compiled_model_calls_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "read_cache", lambda: {})
    kernel, x = TritonInt(random_weight(64, 128, 64), torch.float16), torch.randn(3, 128).half()
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, None), kernel(x, None))


@pytest.mark.parametrize("M", [3, 40])
def test_autotuning_runs_every_candidate_and_is_obeyed(M: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTQBENCH_KERNEL_CACHE", str(tmp_path / "kernels.json"))
    tune.read_cache.cache_clear()
    launched: list[Config] = []
    monkeypatch.setattr(weight_only, "matmul", lambda x, weight, bias, config: launched.append(config))
    monkeypatch.setattr(tune, "_graph_time", lambda call: (call(), -len(launched))[1])  # the last one is the fastest
    kernel = TritonInt(random_weight(64, 128, 64), torch.float16)
    best = weight_only.autotune(kernel, M)
    assert launched == weight_only.candidates(M)
    assert best == launched[-1] == tune.choose(kernel.name, M, 64, 128, 64, torch.float16, torch.device("cpu"))
    tune.read_cache.cache_clear()


def test_every_case_names_each_argument_once() -> None:
    for case in w4a16.cases():
        assert list(case.signature) == list(case.kernel.arg_names)
        assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)
    assert len({case.name for case in w4a16.cases()}) == len(w4a16.cases())
