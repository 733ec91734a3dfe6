"""When the value of a configuration field decides the result of a run.

Each field of a configuration class has one of these mappings as its metadata. `harness.runs.identity` reads them to
compute the run id; there is no other list. A field without metadata, such as an option of a method, always decides; a
field that a method or format gets later has CHANGED.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any


class Decides(Enum):
    """The runs in which a field decides the result."""

    ALWAYS = "always"
    NEVER = "never"
    QUANTIZED = "in runs that quantize"
    CALIBRATED = "in runs that read calibration data"
    ANALYSED = "in runs that analyse the quantized model"
    MIXED = "in runs that choose a width for each linear"
    CHANGED = "where it differs from the default, so that the run ids from before the field existed stay valid"


Metadata = Mapping[str, Decides]


def _metadata(when: Decides) -> Metadata:
    return MappingProxyType({"decides": when})


ALWAYS = _metadata(Decides.ALWAYS)
NEVER = _metadata(Decides.NEVER)
QUANTIZED = _metadata(Decides.QUANTIZED)
CALIBRATED = _metadata(Decides.CALIBRATED)
ANALYSED = _metadata(Decides.ANALYSED)
MIXED = _metadata(Decides.MIXED)
CHANGED = _metadata(Decides.CHANGED)


def decides(field: dataclasses.Field[Any]) -> Decides:
    """The runs in which the value of `field` decides the result."""
    when: Decides = field.metadata.get("decides", Decides.ALWAYS)
    return when
