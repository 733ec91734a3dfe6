"""Linears that read the same input, computed together: the same bits, one call a token, nothing kept afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.core import FloatWeight, IntWeight, LevelsWeight, round_to_nearest
from harness.kernels.base import JoinableKernel, Kernel
from harness.kernels.joint import JoinedLinear, Joint, join
from harness.kernels.native import grouped, int8
from tests.support.kernels import INPUTS, built, quantizer, uneven, uneven_floats

ROWS, COLUMNS = (48, 16, 32), 64
GROUPS = IntWeight(bits=4, granularity="group", group_size=32)
FORMATS = {
    "zero points": GROUPS,
    "symmetric": IntWeight(bits=3, granularity="group", group_size=16, symmetric=True),
    "float zero points": IntWeight(bits=8, granularity="group", group_size=32, zero_point="float"),
    "rows": IntWeight(bits=6, granularity="channel", scale_dtype="float32"),
}
FLOATS = {
    "FP8": FloatWeight(element="e5m2"),
    "FP8 in blocks": FloatWeight(element="e4m3", granularity="block", group_size=48),
    "MXFP6": FloatWeight(element="e3m2", granularity="group", group_size=32, scale_dtype="e8m0"),
}


def kernels(kind: str) -> list[JoinableKernel]:
    if kind == "levels":
        fmt = LevelsWeight(table="nf4", group_size=32, double_quant=True)
        return [grouped.build(round_to_nearest(torch.randn(rows, COLUMNS), fmt)) for rows in ROWS]
    if kind in INPUTS:
        fmt = IntWeight(bits=8, symmetric=True, grid="narrow")
        return [int8.Int8Linear.of(uneven(rows, COLUMNS, fmt), quantizer(kind)) for rows in ROWS]
    if kind in FLOATS:
        return [grouped.build(uneven_floats(rows, COLUMNS, FLOATS[kind])) for rows in ROWS]
    return [grouped.build(uneven(rows, COLUMNS, FORMATS[kind])) for rows in ROWS]


@built
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["levels", *FORMATS, *FLOATS, *INPUTS])
def test_joined_linears_give_the_same_bits(kind: str, with_bias: bool) -> None:
    own = kernels(kind)
    biases = [torch.randn(rows) if with_bias else None for rows in ROWS]
    inputs = [2 * torch.randn(*tokens, COLUMNS) for tokens in ((1, 1), (), (2, 3))]
    expected = [[kernel(x, bias) for kernel, bias in zip(own, biases, strict=True)] for x in inputs]
    joined = join(own, biases)
    assert joined is not None
    for x, outputs in zip(inputs, expected, strict=True):
        for kernel, bias, output in zip(joined, biases, outputs, strict=True):
            assert torch.equal(kernel(x, bias), output)
            assert kernel(x, bias).shape == output.shape
    for kernel, before in zip(joined, own, strict=True):
        for key in ("name", "shape", "quantizes_inputs"):
            assert getattr(kernel, key) == getattr(before, key)


@built
def test_joined_weights_are_stored_once() -> None:
    joined = join(kernels("zero points"), [None] * 3)
    assert joined is not None
    for key in ("qweight", "scale", "zero_point"):
        storages = {kernel.own.get_buffer(key).untyped_storage().data_ptr() for kernel in joined}
        assert len(storages) == 1


class Counting(JoinableKernel):
    """Doubles its inputs for each of its rows, and counts its calls."""

    name = "counting"

    def __init__(self, rows: int) -> None:
        super().__init__((rows, 1))
        self.calls = 0

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        self.calls += 1
        return inputs * 2 + torch.arange(self.shape[0])

    @classmethod
    def joined(cls, kernels: Sequence[Kernel]) -> Kernel | None:
        return cls(sum(kernel.shape[0] for kernel in kernels))


def counting() -> tuple[Counting, list[JoinedLinear]]:
    whole = Counting(5)
    joint = Joint(whole, None, [2, 3])
    return whole, [JoinedLinear(Counting(rows), joint, i) for i, rows in enumerate((2, 3))]


def test_a_token_is_computed_once_and_forgotten() -> None:
    whole, (first, second) = counting()
    for value in (1.0, 7.0):
        x = torch.full((1, 1), value)
        assert first(x, None).tolist() == [[2 * value, 2 * value + 1]]
        assert second(x, None).tolist() == [[2 * value + 2, 2 * value + 3, 2 * value + 4]]
        reference = weakref.ref(x)
        del x
        gc.collect()
        assert reference() is None
    assert whole.calls == 2


def test_other_inputs_and_second_calls_are_computed_again() -> None:
    whole, (first, second) = counting()
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    assert first(x, None).tolist() == first(x, None).tolist() == [[2, 3]]
    assert whole.calls == 2
    assert second(y, None).tolist() == [[2, 3, 4]]  # parts of x are still there
    assert first(x, None).tolist() == [[2, 3]]
    assert second(x, None).tolist() == [[4, 5, 6]]


def test_several_tokens_are_computed_by_each_linear() -> None:
    whole, (first, second) = counting()
    x = torch.ones(4, 1)
    assert first(x, None).shape == (4, 2)
    assert second(x, None).shape == (4, 3)
    assert (whole.calls, first.own.calls, second.own.calls) == (0, 1, 1)


@built
def test_what_cannot_be_stored_as_one_weight_is_not_joined() -> None:
    four = grouped.build(uneven(32, COLUMNS, GROUPS))
    for other in (
        uneven(32, COLUMNS, IntWeight(bits=3, granularity="group", group_size=32)),
        uneven(32, COLUMNS, IntWeight(bits=4, granularity="group", group_size=16)),
        uneven(32, COLUMNS, IntWeight(bits=4, granularity="group", group_size=32, scale_dtype="float32")),
        uneven(32, COLUMNS, IntWeight(bits=4, granularity="group", group_size=32, symmetric=True)),
        uneven(24, COLUMNS, GROUPS),  # its last panel is half empty
    ):
        assert join([four, grouped.build(other)], [None] * 2) is None
    floats = [grouped.build(uneven_floats(16, COLUMNS, FloatWeight(element=name))) for name in ("e4m3", "e5m2")]
    assert join(floats, [None] * 2) is None
    fitting = grouped.build(uneven(16, COLUMNS, GROUPS))
    assert join([four, fitting], [torch.zeros(32), None]) is None
    assert join([four], [None]) is None
    eight = uneven(16, COLUMNS, IntWeight(bits=8))
    static = [int8.Int8Linear.of(eight, quantizer("static", low)) for low in (-2, -9)]
    assert join(static, [None] * 2) is None
    assert join([Counting(2), Counting(3)], [None] * 2) is not None
