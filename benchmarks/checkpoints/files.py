"""Where the files of a model are, and how one is written: beside its place, then renamed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

FLOAT, GGUF, CALIBRATION = "float", "float.gguf", "calibration.safetensors"


def once(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or a folder at a path beside `target`, and rename it; do nothing if `target` is there."""
    if target.exists():
        return
    part = target.with_name(f"part-{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    part.unlink(missing_ok=True)
    write(part)
    part.rename(target)
    print(target, flush=True)
