"""The seam through which core and methods reach operators of the native library."""

from __future__ import annotations

import pytest

from harness.core.operators import operator
from tests.support.kernels import LEVELS, built


@built
def test_an_operator_of_the_library_is_called() -> None:
    level = operator("level")
    assert level is not None
    assert level() in LEVELS


def test_an_operator_that_the_library_lacks_is_none() -> None:
    assert operator("no_such_operator") is None


@pytest.mark.usefixtures("torch_kernels")
def test_without_the_library_there_is_no_operator() -> None:
    assert operator("level") is None
