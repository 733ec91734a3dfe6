"""Metrics that a model does not have: an error of an optional stage becomes a warning, and the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.nn import is_memory, reason
from harness.utils.errors import trace

_LONGEST = 200  # characters of a warning
_NO_MEMORY = "; free memory and use force=true"


@contextmanager
def optional(warnings: list[str], stage: str, metrics: str) -> Iterator[None]:
    """Turn any error into one of the `warnings`: `stage` failed with a reason, and `metrics` are absent.

    It is for stages that a result does not need: a perplexity stays true if the model cannot be timed.
    """
    try:
        yield
    except Exception as error:  # whatever fails here, the run keeps what it has measured
        trace()
        warnings.append(_warning(error, stage, metrics))


def _warning(error: Exception, stage: str, metrics: str) -> str:
    end = f"; {metrics} not measured{_NO_MEMORY if is_memory(error) else ''}"
    text = " ".join(str(error).split())
    length = _LONGEST - len(stage) - 2 - len(end)
    if type(error) is not ValueError or len(text) > length:
        text = reason(error, length)
    return f"{stage}: {text}{end}"
