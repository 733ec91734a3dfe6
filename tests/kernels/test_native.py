"""The native CPU kernels against float64 arithmetic on their decoded weight, at every level that this processor has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.core import IntQTensor, QTensor, WeightFormat, round_to_nearest
from harness.core.formats import LevelsQTensor
from harness.kernels.native import grouped, library
from harness.kernels.native.panels import WIDTHS, pack_panels, unpack_panels
from harness.kernels.table import choose
from harness.nn import QuantLinear

CPU = torch.device("cpu")
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")
TOKENS = (1, 2, 3, 8, 9, 30)  # of inputs: below and above the limits at which the kernels change their path
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
built = pytest.mark.skipif(not library.available(), reason=f"the native library is {library.problem()}")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of processor features that this processor has."""
    if library.set_level(request.param) != request.param:
        pytest.skip(f"this processor lacks the features of {request.param}")
    yield request.param
    library.set_level("")


def grid(rows: int, columns: int, fmt: WeightFormat) -> IntQTensor:
    """A weight whose groups differ in scale and offset, so that a wrong group index is detected."""
    spread = torch.rand(fmt.groups((rows, columns))).mul(4).exp()[..., None]
    offset = torch.randn(fmt.groups((rows, columns)))[..., None]
    groups = torch.randn(*spread.shape[:2], columns * rows // spread[..., 0].numel()) + offset
    return round_to_nearest((groups * spread).view(rows, columns) * 0.01, fmt)


def check(weight: QTensor, dtype: torch.dtype, tokens: int, bound: float | None = None) -> None:
    """Compare the kernel of a weight with float64 arithmetic, on fresh inputs and with a bias."""
    inputs, bias = torch.randn(1, tokens, weight.shape[1]).to(dtype), torch.randn(weight.shape[0]).to(dtype)
    outputs = grouped.build(weight)(inputs, bias)
    expected = inputs.double() @ weight.dequantize(torch.float64).t() + bias.double()
    assert outputs.shape == expected.shape
    assert outputs.dtype == dtype
    error = float((outputs.double() - expected).norm() / expected.norm())
    assert error < (bound or BOUNDS[dtype])


def test_the_library_is_built_where_a_compiler_is() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler is installed")
    assert library.problem() is None
    assert library.description() in LEVELS


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "sources_digest", lambda: "other")
    assert library.problem.__wrapped__() in (
        "built from other sources; run make setup again",
        "not built; run make setup where a C++17 compiler is installed",
    )


@built
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("bits", [*WIDTHS, 7])
def test_every_width(level: str, bits: int, dtype: torch.dtype) -> None:
    for tokens, (rows, columns, size) in zip(TOKENS, ((48, 96, 32), (40, 80, 16), (16, 192, 64)) * 2, strict=True):
        check(grid(rows, columns, WeightFormat(bits=bits, granularity="group", group_size=size)), dtype, tokens)


@built
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "group", "group_size": 48, "symmetric": True, "grid": "narrow"},
        {"granularity": "group", "group_size": 48, "zero_point": "float"},
        {"granularity": "group", "group_size": 48, "zero_point": "float", "scale_dtype": "bfloat16"},
        {"granularity": "group", "group_size": 48, "scale_dtype": "float32"},
        {"granularity": "channel"},
        {"granularity": "tensor", "symmetric": True},
    ],
)
def test_every_format(level: str, bits: int, options: dict[str, Any]) -> None:
    for tokens in (1, 5, 20):
        check(grid(37, 144, WeightFormat(bits=bits, **options)), torch.float32, tokens)


@built
@pytest.mark.parametrize("columns", [1, 15, 17, 77])
def test_rows_of_any_length(level: str, columns: int) -> None:
    for dtype in BOUNDS:
        for tokens in (2, 11):
            check(grid(19, columns, WeightFormat(bits=4)), dtype, tokens)


@built
@pytest.mark.parametrize("double_quant", [False, True])
def test_levels(level: str, double_quant: bool) -> None:
    levels = torch.randn(16).sort().values / 2
    weight = LevelsQTensor(torch.randn(48, 128) * torch.rand(48, 1).mul(4).exp(), levels, 64, double_quant)
    for dtype in BOUNDS:
        for tokens in TOKENS:
            check(weight, dtype, tokens)


@built
def test_no_rows(level: str) -> None:
    assert grouped.build(grid(20, 64, WeightFormat(bits=4)))(torch.zeros(2, 0, 64), None).shape == (2, 0, 20)


@built
def test_many_rows_in_several_parts(level: str) -> None:
    fmt = WeightFormat(bits=4, granularity="group", group_size=512)
    check(grid(48, 1024, fmt), torch.bfloat16, 500)  # rows of 2048 bytes, which are moved apart in memory
    check(grid(1040, 32, WeightFormat(bits=2)), torch.float32, 250)  # several slabs of panels


@built
def test_a_large_mean_does_not_cancel(level: str) -> None:
    """Sums over groups with zero points lose digits where inputs have a large mean; a few are allowed."""
    weight, inputs = grid(32, 128, WeightFormat(bits=8, granularity="group", group_size=64)), torch.randn(2, 128) + 30
    expected = inputs.double() @ weight.dequantize(torch.float64).t()
    outputs = grouped.build(weight)(inputs, None)
    assert float((outputs - expected).norm() / expected.norm()) < 1e-5


@built
def test_a_sum_does_not_depend_on_threads(level: str) -> None:
    threads, outputs = torch.get_num_threads(), list[Tensor]()
    kernel = grouped.build(grid(80, 64, WeightFormat(bits=4)))
    inputs = [torch.randn(tokens, 64) for tokens in (1, 40)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(torch.cat([kernel(part, None) for part in inputs]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(WIDTHS), st.integers(0, 1 << 30))
def test_panels_hold_every_code(rows: int, columns: int, bits: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    panels = pack_panels(codes, bits)
    assert panels.shape == (-(-rows // 16), -(-columns // 32), bits, 16)
    assert torch.equal(unpack_panels(panels, (rows, columns)), codes.to(torch.uint8))


@built
@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (WeightFormat(bits=4, granularity="group", group_size=8), torch.float32),
        (WeightFormat(bits=4, granularity="group", group_size=24), torch.float32),
        (WeightFormat(bits=4), torch.float16),
        (WeightFormat(bits=4), torch.float64),
    ],
)
def test_what_the_kernel_does_not_run_is_left_to_others(fmt: WeightFormat, dtype: torch.dtype) -> None:
    assert not grouped.supports(grid(16, 48, fmt), dtype)


@built
def test_blocks_that_span_rows_are_left_to_others() -> None:
    weight = LevelsQTensor(torch.randn(8, 96), torch.linspace(-1, 1, 16), 64, False)
    assert not grouped.supports(weight, torch.float32)


@built
def test_the_table_prefers_the_native_kernel_and_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = grid(32, 64, WeightFormat(bits=4, granularity="group", group_size=32))
    kernel = choose(weight, None, torch.bfloat16, CPU)
    assert kernel is not None
    assert kernel.name == "native_int4"
    monkeypatch.setattr(library, "problem", lambda: "not built")
    kernel = choose(weight, None, torch.bfloat16, CPU)
    assert kernel is not None
    assert kernel.name == "cpu_w4a16"


@built
def test_the_operator_compiles() -> None:
    kernel, inputs = grouped.build(grid(32, 64, WeightFormat(bits=4))), torch.randn(3, 64)
    stored = (kernel.qweight, kernel.levels, kernel.scale, kernel.zero_point)
    torch.library.opcheck(torch.ops.ptqbench_native.grouped_linear, (inputs, *stored, None, 32))


@built
@pytest.mark.parametrize("wrong", ["codes", "scale", "columns", "dtype"])
def test_tensors_that_do_not_fit_are_refused(wrong: str) -> None:
    kernel = grouped.build(grid(32, 64, WeightFormat(bits=4, granularity="group", group_size=32)))
    inputs = torch.randn(2, 63 if wrong == "columns" else 64)
    if wrong == "codes":
        kernel.qweight = kernel.qweight[:1]
    elif wrong == "scale":
        kernel.scale = kernel.scale[..., :8]
    elif wrong == "dtype":
        inputs = inputs.half()
    with pytest.raises(RuntimeError, match=r"expected|do not hold|must have"):
        kernel(inputs, None)


@built
def test_resident_memory_is_that_of_codes_and_groups() -> None:
    weight = grid(64, 256, WeightFormat(bits=3, granularity="group", group_size=64))
    linear = QuantLinear(weight, None, torch.float32).pack()
    groups = 64 * 4
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 64 * 256 * 3 // 8 + groups * 4 + 32 * 4
