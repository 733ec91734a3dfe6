"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def first_missing(folder: Path) -> Path | None:
    """The topmost folder on the way to `folder` that does not exist; None if `folder` exists."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def remove_empty(top: Path | None) -> None:
    """Remove `top` and the folders in it as far as they are empty; None: nothing."""
    if top is not None and top.is_dir():
        for path in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):
                path.rmdir()
        with suppress(OSError):
            top.rmdir()
