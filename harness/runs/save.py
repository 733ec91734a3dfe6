"""Saving the quantized model of a run, in the format of `export`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from harness.config import RunConfig
from harness.models import Source
from harness.models.exchange import export
from harness.quantization import Result
from harness.utils.errors import one_line, trace


def check(cfg: RunConfig, folder: Path) -> None:
    """Check that the model can be saved, before anything is computed.

    Raises: ValueError if the folder cannot be written, or the format of `export` cannot hold the scheme.
    """
    export.check(folder)
    if cfg.scheme is not None:
        for scheme in map(cfg.scheme.at, cfg.mixed.widths) if cfg.mixes else [cfg.scheme]:
            export.WRITERS[cfg.export].check(scheme)


def save(cfg: RunConfig, source: Source, model: nn.Module, result: Result) -> str | None:
    """Save the quantized model of a run that has a folder for it. After an error the run goes on.

    Returns: the error in one line; None if there was none.
    """
    assert cfg.save is not None
    assert cfg.scheme is not None
    try:
        writer = export.WRITERS[cfg.export]
        export.export(model, result.weights, cfg.scheme, source, Path(cfg.save), writer)
    except Exception as error:  # whatever fails here, the model can still be evaluated
        trace()
        return one_line(error)
    finally:
        result.weights.clear()
    return None
