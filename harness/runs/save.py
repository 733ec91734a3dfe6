"""Saving the quantized model of a run, in the format of `export`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from harness.config import RunConfig
from harness.models import Source
from harness.models.exchange import export
from harness.models.exchange.writer import Quantized
from harness.quantization import Result
from harness.utils.errors import one_line, trace


def check(cfg: RunConfig, source: Source, folder: Path) -> None:
    """Check that the model can be saved, before anything is computed.

    Raises: ValueError if the folder cannot be written, or the format of `export` cannot hold the scheme or the model.
    """
    export.check(folder)
    if cfg.scheme is not None:
        writer = export.WRITERS[cfg.export]
        for scheme in map(cfg.scheme.at, cfg.mixed.widths) if cfg.mixes else [cfg.scheme]:
            writer.check(scheme)
        writer.check_model(source)


def save(cfg: RunConfig, source: Source, model: nn.Module, result: Result) -> str | None:
    """Save the quantized model of a run that has a folder for it. After an error the run goes on.

    Returns: the error in one line; None if there was none.
    """
    assert cfg.save is not None
    assert cfg.scheme is not None
    try:
        quantized = Quantized(model, result.weights, cfg.scheme, source)
        export.export(quantized, Path(cfg.save), export.WRITERS[cfg.export])
    except Exception as error:  # whatever fails here, the model can still be evaluated
        trace()
        return one_line(error)
    finally:
        result.weights.clear()
    return None
