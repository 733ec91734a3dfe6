"""The native CPU kernels against float64 arithmetic on their decoded weight, at every level that this processor has."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.core import FloatQTensor, FloatWeight, IntQTensor, IntWeight, LevelsQTensor, LevelsWeight, round_to_nearest
from harness.core.formats import Params
from harness.kernels.native import grouped, library
from harness.kernels.native.panels import WIDTHS, pack_panels, unpack_panels
from harness.kernels.table import choose
from harness.nn import QuantLinear
from tests.support.kernels import BOUNDS, CPU, LEVELS, TOKENS, built, check, check_threads, uneven, uneven_floats

ELEMENTS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")


def compare(weight: IntQTensor | FloatQTensor | LevelsQTensor, dtype: torch.dtype, tokens: int) -> None:
    check(grouped.build(weight), weight, dtype, tokens)


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
        compare(uneven(rows, columns, IntWeight(bits=bits, granularity="group", group_size=size)), dtype, tokens)


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
        compare(uneven(37, 144, IntWeight(bits=bits, **options)), torch.float32, tokens)


@built
@pytest.mark.parametrize("columns", [1, 15, 17, 77])
def test_rows_of_any_length(level: str, columns: int) -> None:
    for dtype in BOUNDS:
        for tokens in (2, 11):
            compare(uneven(19, columns, IntWeight(bits=4)), dtype, tokens)


@built
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "group", "group_size": 32, "scale_dtype": "e8m0"},
        {"granularity": "group", "group_size": 16, "scale_dtype": "e4m3", "tensor_scale": True},
        {"granularity": "group", "group_size": 48},
        {"granularity": "channel", "scale_dtype": "bfloat16"},
        {"granularity": "tensor"},
        {"granularity": "block", "group_size": 32},
        {"granularity": "block", "group_size": 128},  # the last blocks of rows and inputs are cut
        {"granularity": "block", "group_size": 1000},
    ],
)
def test_small_floats(level: str, element: str, options: dict[str, Any]) -> None:
    weight = uneven_floats(37, 192, FloatWeight(element=element, **options))
    assert grouped.build(weight).name == f"native_{element}"
    for dtype in BOUNDS:
        for tokens in TOKENS:
            compare(weight, dtype, tokens)


@built
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_code_of_small_floats(level: str, element: str) -> None:
    """Rows of the identity select one code each, so that the outputs are its exact value."""
    kind = FloatWeight(element=element).kind
    codes = torch.arange(1 << kind.bits)
    codes = torch.where(kind.levels.isnan(), 0, codes)
    codes = torch.stack([codes.roll(row) for row in range(21)]).to(torch.uint8)
    weight = FloatQTensor(codes, Params(torch.ones(1, 1)), FloatWeight(element=element, granularity="tensor"))
    kernel = grouped.build(weight)
    for dtype in BOUNDS:
        inputs = torch.eye(codes.shape[1], dtype=dtype)
        expected = kind.levels[codes.int()].t().to(dtype)
        for count in (1, 2, 4, 8, len(inputs)):
            outputs = torch.cat([kernel(part, None) for part in inputs.split(count)])
            assert torch.equal(outputs, expected)


@built
@pytest.mark.parametrize("columns", [1, 15, 17, 77])
def test_small_floats_in_rows_of_any_length(level: str, columns: int) -> None:
    for element in ("e4m3", "e3m2"):
        weight = uneven_floats(19, columns, FloatWeight(element=element, granularity="block", group_size=128))
        for dtype in BOUNDS:
            for tokens in (2, 11):
                compare(weight, dtype, tokens)


@built
@pytest.mark.parametrize("dtype", BOUNDS)
def test_small_floats_of_many_rows_in_several_parts(level: str, dtype: torch.dtype) -> None:
    compare(uneven_floats(48, 1040, FloatWeight(element="e4m3", granularity="block", group_size=128)), dtype, 600)
    compare(uneven_floats(1040, 32, FloatWeight(element="e2m3")), dtype, 250)  # several slabs of panels


@pytest.mark.parametrize(
    "fmt",
    [
        FloatWeight(element="e4m2"),  # 7 bits
        FloatWeight(element="e3m4"),
        FloatWeight(element="e1m4"),
        FloatWeight(element="e4m3", granularity="group", group_size=8),
        FloatWeight(element="e4m3", granularity="block", group_size=24),
        FloatWeight(element="e2m1", granularity="block", group_size=20),
    ],
)
def test_small_floats_that_the_kernel_does_not_run(fmt: FloatWeight) -> None:
    assert not grouped.supports(uneven_floats(32, 80, fmt), torch.float32)


@built
def test_scales_that_leave_the_range_of_the_kernel_are_left_to_others() -> None:
    fmt = FloatWeight(element="e4m3", scale_dtype="e8m0")
    for exponent, fits in ((119.0, True), (120.0, False)):  # values of the kernel are 2^-8 of the element's
        scale = torch.tensor([[1.0], [2.0**exponent]])
        weight = FloatQTensor(torch.ones(2, 32, dtype=torch.uint8), Params(scale), fmt)
        assert grouped.supports(weight, torch.float32) == fits
        if fits:
            compare(weight, torch.float32, 3)


@built
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_the_table_chooses_the_native_kernel_for_small_floats(element: str, dtype: torch.dtype) -> None:
    kernel = choose(uneven_floats(32, 64, FloatWeight(element=element)), None, dtype, CPU)
    assert kernel is not None
    assert kernel.name == f"native_{element}"


@built
@pytest.mark.parametrize(
    "fmt",
    [
        LevelsWeight(table="nf4", granularity="flat", group_size=64, double_quant=True),
        LevelsWeight(table="fp4", group_size=64),
        LevelsWeight(table="lloyd_max", bits=3, group_size=16, scale_dtype="float16"),
        LevelsWeight(table="lloyd_max", bits=5, granularity="channel"),
        LevelsWeight(table="lloyd_max", bits=2, granularity="tensor"),
    ],
    ids=lambda fmt: fmt.label,
)
def test_levels(level: str, fmt: LevelsWeight) -> None:
    weight = round_to_nearest(torch.randn(48, 128) * torch.rand(48, 1).mul(4).exp(), fmt)
    for dtype in BOUNDS:
        for tokens in TOKENS:
            compare(weight, dtype, tokens)


@built
def test_no_rows(level: str) -> None:
    assert grouped.build(uneven(20, 64, IntWeight(bits=4)))(torch.zeros(2, 0, 64), None).shape == (2, 0, 20)


@built
@pytest.mark.parametrize("dtype", BOUNDS)
def test_many_rows_in_several_parts(level: str, dtype: torch.dtype) -> None:
    compare(uneven(48, 1024, IntWeight(bits=4, granularity="group", group_size=512)), dtype, 600)
    compare(uneven(1040, 32, IntWeight(bits=2)), dtype, 250)  # several slabs of panels


@built
def test_many_rows_and_many_panels_in_several_blocks_of_inputs(level: str) -> None:
    for size in (64, 80):  # inputs become digits in chunks of 64
        compare(uneven(4300, 20 * size, IntWeight(bits=3, granularity="group", group_size=size)), torch.float32, 300)


@built
def test_a_large_mean_does_not_cancel(level: str) -> None:
    """Sums over groups with zero points lose digits where inputs have a large mean; a few are allowed."""
    weight, inputs = uneven(32, 128, IntWeight(bits=8, granularity="group", group_size=64)), torch.randn(2, 128) + 30
    expected = inputs.double() @ weight.dequantize(torch.float64).t()
    outputs = grouped.build(weight)(inputs, None)
    assert float((outputs - expected).norm() / expected.norm()) < 1e-5


@built
def test_a_sum_does_not_depend_on_threads(level: str) -> None:
    check_threads(grouped.build(uneven(80, 64, IntWeight(bits=4))))


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
        (IntWeight(bits=4, granularity="group", group_size=8), torch.float32),
        (IntWeight(bits=4, granularity="group", group_size=24), torch.float32),
        (IntWeight(bits=4), torch.float16),
        (IntWeight(bits=4), torch.float64),
    ],
)
def test_what_the_kernel_does_not_run_is_left_to_others(fmt: IntWeight, dtype: torch.dtype) -> None:
    assert not grouped.supports(uneven(16, 48, fmt), dtype)


@built
def test_blocks_that_span_rows_are_left_to_others() -> None:
    weight = round_to_nearest(torch.randn(8, 96), LevelsWeight(table="nf4", granularity="flat", group_size=64))
    assert not grouped.supports(weight, torch.float32)


@built
def test_the_table_prefers_the_native_kernel_and_does_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = uneven(32, 64, IntWeight(bits=4, granularity="group", group_size=32))
    kernel = choose(weight, None, torch.bfloat16, CPU)
    assert kernel is not None
    assert kernel.name == "native_int4"
    monkeypatch.setattr(library, "problem", lambda: "not built")
    kernel = choose(weight, None, torch.bfloat16, CPU)
    assert kernel is not None
    assert kernel.name == "cpu_w4a16"


@built
def test_the_operator_compiles() -> None:
    four, float8 = uneven(32, 64, IntWeight(bits=4)), uneven_floats(32, 64, FloatWeight(element="e4m3"))
    for kernel, exponent in ((grouped.build(four), 0), (grouped.build(float8), 4)):
        stored = (kernel.qweight, kernel.levels, kernel.scale, kernel.zero_point)
        arguments = (torch.randn(3, 64), *stored, None, exponent, 32)
        torch.library.opcheck(torch.ops.ptqbench_native.grouped_linear, arguments)


@built
@pytest.mark.parametrize("tokens", [17, 33, 70, 600])
@pytest.mark.parametrize("columns", [48, 272, 1040, 2064])
def test_many_rows_of_stacks_and_tiles_that_end_anywhere(level: str, columns: int, tokens: int) -> None:
    weight = uneven(37, columns, IntWeight(bits=4, granularity="group", group_size=16))
    compare(weight, torch.bfloat16, tokens)


@built
@pytest.mark.parametrize("tokens", [5, 17, 33, 70])
@pytest.mark.parametrize("columns", [48, 272, 1040, 2064])
def test_many_rows_of_digits_and_chunks_that_end_anywhere(level: str, columns: int, tokens: int) -> None:
    weight = uneven(37, columns, IntWeight(bits=4))
    compare(weight, torch.float32, tokens)


@built
@pytest.mark.parametrize("wrong", ["codes", "scale", "columns", "dtype", "exponent"])
def test_tensors_that_do_not_fit_are_refused(wrong: str) -> None:
    kernel = grouped.build(uneven(32, 64, IntWeight(bits=4, granularity="group", group_size=32)))
    inputs = torch.randn(2, 63 if wrong == "columns" else 64)
    if wrong == "codes":
        kernel.qweight = kernel.qweight[:1]
    elif wrong == "scale":
        kernel.scale = kernel.scale[..., :8]
    elif wrong == "dtype":
        inputs = inputs.half()
    elif wrong == "exponent":
        kernel._exponent = 2  # of 4 bits
    with pytest.raises(RuntimeError, match=r"expected|do not hold|must have"):
        kernel(inputs, None)


@built
def test_resident_memory_is_that_of_codes_and_groups() -> None:
    weight = uneven(64, 256, IntWeight(bits=3, granularity="group", group_size=64))
    linear = QuantLinear(weight, None, torch.float32).pack()
    groups = 64 * 4
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 64 * 256 * 3 // 8 + groups * 4 + 32 * 4
    blocks = uneven_floats(64, 256, FloatWeight(element="e4m3", granularity="block", group_size=128))
    linear = QuantLinear(blocks, None, torch.float32).pack()
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 64 * 256 + 64 * 2 * 4 + 32 * 4
