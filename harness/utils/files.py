"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new file in the folder of `target`; at the end, once its content is on the disk, it replaces `target`.

    After an error, the new file is removed and `target` is unchanged.
    Raises: OSError if the disk is full or the folder cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.chmod(0o644)  # mkstemp creates it readable by its owner only
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
