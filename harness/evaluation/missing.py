"""Metrics that a model does not have: an error of an optional stage becomes a warning, and the run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harness.utils.errors import trace
from harness.utils.explain import fitted, is_memory, reason

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
    text = " ".join(str(error).split()) if type(error) is ValueError else reason(error)
    return fitted(f"{stage}: ", text, end)
