"""The loop over columns: its native operator gives the bits of the torch loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from harness.core import IntWeight
from harness.core.formats import Params
from harness.core.solvers import columns as module
from harness.core.solvers.columns import Columns, solve_columns
from tests.support.kernels import built

FORMATS = {
    "integer": IntWeight(bits=4, granularity="group", group_size=8),
    "symmetric": IntWeight(bits=3, granularity="group", group_size=8, symmetric=True),
    "float": IntWeight(bits=2, granularity="group", group_size=8, zero_point="float"),
}


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def columns_of(count: int, later: int, outputs: int, fmt: IntWeight) -> Columns:
    """Columns whose groups differ in scale and zero point, in mixed order; their factor is a view, as in GPTQ."""
    every, groups = count + later, -(-count // 8)
    scale = torch.rand(groups, outputs).mul(3).exp().mul(0.02)
    zero_point = torch.rand(groups, outputs).mul(fmt.max_code)
    zero_point = zero_point if fmt.zero_point == "float" and not fmt.symmetric else zero_point.round()
    factor = (torch.randn(every, every + 5) * 0.3).triu()[:count, :every]
    factor.diagonal().abs_().add_(0.5)
    order = (torch.randperm(count) // 8).tolist()
    factor = factor.T.contiguous().T if count % 16 == 0 else factor  # as Cholesky factors are stored
    values, errors = torch.empty(2, count, outputs)
    params = Params(scale, None if fmt.symmetric else zero_point)
    return Columns(torch.randn(every, outputs), values, errors, factor, params, order)


def solved(columns: Columns, fmt: IntWeight) -> torch.Tensor:
    copy = replace(columns, **{name: getattr(columns, name).clone() for name in ("weight", "values", "errors")})
    solve_columns(copy, fmt)
    return torch.cat([copy.weight, copy.values, copy.errors])


@built
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("count", "later", "outputs"), [(1, 0, 64), (8, 3, 7), (32, 0, 100), (128, 0, 576), (16, 112, 520), (64, 0, 1539)]
)
def test_the_operator_gives_the_bits_of_the_loop(
    name: str, count: int, later: int, outputs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, fmt = columns_of(count, later, outputs, FORMATS[name]), FORMATS[name]
    natively = solved(columns, fmt)
    monkeypatch.setattr(module, "operator", lambda _name: None)
    assert torch.equal(natively, solved(columns, fmt))


@built
def test_the_operator_changes_only_what_its_schema_says() -> None:
    columns = columns_of(8, 3, 40, FORMATS["integer"])
    torch.library.opcheck(
        torch.ops.ptqbench_native.solve_columns.default,
        (
            *(columns.weight, columns.values, columns.errors, columns.factor),
            *(columns.params.scale, columns.params.zero_point, columns.groups, 0.0, 15.0, False),
        ),
        test_utils="test_schema",
    )


@built
def test_the_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "_solve_natively", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(module, "_rounds_as_torch", lambda *_: True)
    solve_columns(columns_of(8, 0, 64, FORMATS["integer"]), FORMATS["integer"])
    assert len(calls) == (torch.backends.cpu.get_cpu_capability() in {"AVX512", "AVX2"})


@pytest.mark.usefixtures("torch_kernels")
def test_the_loop_rounds_each_column_and_compensates_for_its_error() -> None:
    fmt = FORMATS["integer"]
    columns = columns_of(8, 2, 5, fmt)
    before, U = columns.weight.double(), columns.factor.double()
    solve_columns(columns, fmt)
    for i, g in enumerate(columns.groups):
        scale, zero_point = columns.params.scale[g].double(), columns.params.zero_point[g].double()
        codes = (before[i] / scale + zero_point).round().clamp(0, fmt.max_code)
        assert torch.allclose(columns.values[i].double(), (codes - zero_point) * scale, atol=1e-6)
        error = (before[i] - columns.values[i]) / U[i, i]
        before[i + 1 :] -= U[i, i + 1 :, None] * error
    assert torch.allclose(columns.weight[8:].double(), before[8:], atol=1e-5)
