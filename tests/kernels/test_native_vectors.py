"""The native kernels for E8P (QuIP#) and additive codebooks (AQLM) against float64 arithmetic on the decoded weight."""

from __future__ import annotations

import pytest
import torch

from harness.core import QTensor
from harness.core.formats import AdditiveQTensor, IncoherentQTensor
from harness.core.formats.incoherent import STAGES
from harness.core.hadamard import dense_factor, factors
from harness.kernels.base import Kernel
from harness.kernels.native import additive, library
from harness.kernels.native.additive import AdditiveLinear
from harness.kernels.native.incoherent import IncoherentLinear
from harness.kernels.table import choose
from harness.nn import QuantLinear
from tests.support.kernels import BOUNDS, CPU, TOKENS, built, check, check_threads

# Transforms: 12 x 16 and 36 x 16; 1 x 64 and 12 x 128; odd sizes (Hartley 37 and 5 x 8); 4 x 2 without a dense factor.
SHAPES = ((192, 576), (64, 1536), (37, 40), (16, 8), (50, 104), (128, 256))


def rotated(rows: int, columns: int, bits: int, tuned: bool = False) -> IncoherentQTensor:
    """Random codes; `tuned` replaces the signs by vectors, as fine-tuning does."""
    codes = [torch.randint(0, 1 << book.bits, (rows, columns // 8)) for book in STAGES[bits]]
    left, right = torch.randn(rows), torch.randn(columns)
    weight = IncoherentQTensor(codes, bits, torch.tensor([0.013, 0.004])[: len(codes)], left.sign(), right.sign())
    if tuned:
        weight.left, weight.right = left.half(), right.half()
    return weight


def additive_weight(rows: int, columns: int, books: int, bits: int, size: int = 8) -> AdditiveQTensor:
    codes = torch.randint(0, 1 << bits, (columns // size, books, rows))
    return AdditiveQTensor(codes, torch.randn(books, 1 << bits, size) * 0.1, torch.rand(rows) + 0.5)


def kernel_of(weight: QTensor, dtype: torch.dtype = torch.float32) -> Kernel:
    kernel = choose(weight, None, dtype, CPU)
    assert isinstance(kernel, IncoherentLinear | AdditiveLinear)
    return kernel


def compare(weight: QTensor, dtype: torch.dtype, tokens: int) -> None:
    check(kernel_of(weight, dtype), weight, dtype, tokens)


@built
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("bits", STAGES)
def test_lattice_codes(level: str, bits: int, tuned: bool, dtype: torch.dtype) -> None:
    for tokens, (rows, columns) in zip(TOKENS, SHAPES, strict=True):
        compare(rotated(rows, columns, bits, tuned), dtype, tokens)
        compare(rotated(rows, columns, bits, tuned), dtype, 31 - tokens)


@built
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("books", "bits"), [(1, 8), (2, 8), (3, 4), (1, 12), (2, 12)])
def test_additive_codebooks(level: str, books: int, bits: int, dtype: torch.dtype) -> None:
    for tokens, (rows, columns) in zip(TOKENS, SHAPES, strict=True):
        compare(additive_weight(rows, columns, books, bits), dtype, tokens)
        compare(additive_weight(rows, columns, books, bits), dtype, 31 - tokens)


@built
def test_the_largest_codes_are_read_without_a_sign(level: str) -> None:
    weight = additive_weight(32, 64, 1, 16)
    assert int(weight.codes.max()) > 1 << 15
    compare(weight, torch.float32, 1)
    compare(weight, torch.float32, 20)


@built
def test_many_rows_in_several_parts(level: str) -> None:
    compare(additive_weight(48, 1024, 2, 8), torch.bfloat16, 500)  # rows of 2048 bytes, which are moved apart in memory
    compare(rotated(48, 1024, 2), torch.float32, 500)


@built
def test_rows_in_several_slabs(level: str) -> None:
    compare(additive_weight(1100, 1024, 1, 8), torch.float32, 9)


@built
def test_a_sum_does_not_depend_on_threads(level: str) -> None:
    check_threads(kernel_of(rotated(192, 576, 3)))


@built
def test_no_rows(level: str) -> None:
    for weight in (rotated(16, 8, 2), additive_weight(16, 64, 1, 8)):
        assert kernel_of(weight)(torch.zeros(2, 0, weight.shape[1]), None).shape == (2, 0, 16)


@pytest.mark.parametrize("size", [1, 8, 36, 37, 40, 192, 576, 1536])
def test_the_dense_factor_is_followed_by_a_sylvester_matrix(size: int) -> None:
    dense, product = dense_factor(size), torch.ones(1, 1, dtype=torch.float64)
    for factor in factors(size):
        product = torch.kron(product, factor)
    order = 1 if dense is None else len(dense)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < size // order:
        sylvester = torch.kron(sylvester, torch.tensor([[1, 1], [1, -1]]) / 2**0.5)
    expected = sylvester if dense is None else torch.kron(dense, sylvester)
    torch.testing.assert_close(product, expected)


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_to_others(dtype: torch.dtype) -> None:
    assert choose(rotated(16, 64, 2), None, dtype, CPU) is None
    assert choose(additive_weight(16, 64, 2, 8), None, dtype, CPU) is None


@built
@pytest.mark.parametrize("size", [4, 16])
def test_vectors_of_other_lengths_are_left_to_others(size: int) -> None:
    assert not additive.supports(additive_weight(16, 64, 1, 8, size), torch.float32)


def test_without_the_library_the_format_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "problem", lambda: "not built")
    assert QuantLinear(rotated(16, 64, 2), None, torch.float32).pack().kernel == "e8p"
    assert QuantLinear(additive_weight(16, 64, 2, 8), None, torch.float32).pack().kernel == "additive"


@built
def test_the_record_names_the_kernel() -> None:
    assert QuantLinear(rotated(16, 64, 2), None, torch.float32).pack().kernel == "native_e8p"
    assert QuantLinear(additive_weight(16, 64, 2, 8), None, torch.float32).pack().kernel == "native_additive"


@built
def test_the_operators_compile() -> None:
    kernel, inputs = kernel_of(rotated(24, 80, 3)), torch.randn(3, 80)
    stored = dict(kernel.named_buffers())
    codes, tables = [stored["codes0"], stored["codes1"]], [stored["tables0"], stored["tables1"]]
    sides = (stored["right"], stored["left"], stored["right_matrix"], stored["left_matrix"])
    operators = torch.ops.ptqbench_native
    torch.library.opcheck(operators.incoherent_linear, (inputs, codes, tables, stored["scale"], *sides, None))
    scale = torch.ones(24)
    torch.library.opcheck(operators.additive_linear, (inputs, codes, tables, scale, torch.randn(24), 24))


@built
@pytest.mark.parametrize("wrong", ["codes0", "tables0", "scale", "left", "right", "left_matrix", "dtype"])
def test_tensors_that_do_not_fit_are_refused(wrong: str) -> None:
    kernel, inputs = kernel_of(rotated(24, 80, 2)), torch.randn(2, 80)
    if wrong == "dtype":
        inputs = inputs.half()
    else:
        setattr(kernel, wrong, kernel.get_buffer(wrong)[..., 1:].contiguous())
    with pytest.raises(RuntimeError, match=r"expected|do not|must"):
        kernel(inputs, None)


@built
def test_resident_memory_is_that_of_codes_vectors_and_tables() -> None:
    linear = QuantLinear(rotated(64, 256, 2), None, torch.float32).pack()
    table = 512 * 8
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 64 * 256 // 4 + (64 + 256) * 2 + 4 + table
    other = QuantLinear(rotated(64, 256, 2), None, torch.float32).pack()
    assert linear.get_buffer("packed.tables0").data_ptr() == other.get_buffer("packed.tables0").data_ptr()


@built
def test_resident_memory_of_codebooks() -> None:
    linear = QuantLinear(additive_weight(64, 256, 2, 8), None, torch.float32).pack()
    assert sum(buffer.nbytes for buffer in linear.buffers()) == 64 * 256 // 4 + 2 * 256 * 8 * 4 + 64 * 4
