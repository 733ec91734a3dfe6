"""The range of a static input format where calibration saw only zeros."""

from __future__ import annotations

import pytest
import torch

from harness.core import IntActivation, IntWeight, MinMax, Scheme, Stats
from harness.quantization.install import input_quantizer_of

STATIC = IntActivation(bits=8, granularity="tensor", dynamic=False)
SCHEME = Scheme(name="static", weight=IntWeight(bits=8), activation=STATIC)


def test_a_static_range_without_inputs_is_a_warning() -> None:
    stats = Stats([MinMax], 4)
    stats.update(torch.zeros(3, 4))
    with pytest.warns(UserWarning, match="^all its calibration inputs are 0, so its static range is unknown"):
        input_quantizer_of(SCHEME, stats)


def test_a_static_range_with_inputs_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    stats = Stats([MinMax], 4)
    stats.update(torch.tensor([[0.0, 0.5, -1.0, 0.0]]))
    quantizer = input_quantizer_of(SCHEME, stats)
    assert quantizer is not None
    assert float(quantizer.scale) == pytest.approx(1.5 / 255)
    assert not recwarn.list
