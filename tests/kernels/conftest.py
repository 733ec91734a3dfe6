"""The levels of processor features at which the native kernels are tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.kernels.native import library
from tests.support.kernels import LEVELS


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of processor features that this processor has."""
    if library.set_level(request.param) != request.param:
        pytest.skip(f"this processor lacks the features of {request.param}")
    yield request.param
    library.set_level("")
