"""Files of llama.cpp (llama-cpp-python 0.3.36), in its everyday types; it calibrates nothing."""

from __future__ import annotations

from pathlib import Path

from benchmarks.checkpoints.files import GGUF, once

TYPES = ("Q8_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")


def write(model: str, folder: Path) -> None:
    """Write the file of each type."""
    from benchmarks.peers import llama

    for name in TYPES:
        once(folder / f"llama.cpp_{name}.gguf", lambda part, name=name: llama.write(folder / GGUF, part, name))  # type: ignore[misc]
