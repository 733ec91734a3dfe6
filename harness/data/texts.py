"""Text files as text: UTF-8, plain or compressed by gzip, without byte order mark, each line ended by a line feed.

The same text gives the same tokens and hashes, whichever system wrote the file.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.utils.digests import sha256
from harness.utils.errors import Refusal

_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}


@dataclass(frozen=True)
class Changes:
    """What was normalized in a text: whether a byte order mark was removed, how many line ends became line feeds."""

    mark: bool = False
    line_ends: int = 0

    def __str__(self) -> str:
        """The parts in words; empty if nothing was normalized."""
        mark = "a byte order mark was removed" if self.mark else ""
        line_ends = f"{self.line_ends} line ends (CRLF, CR) became LF" if self.line_ends else ""
        return ", ".join(filter(None, [mark, line_ends]))


def read(key: str, path: Path) -> tuple[str, Changes]:
    """The normalized text of a file, and what was normalized. `key` is the configuration key that names the file.

    Raises: ValueError if the file is missing, is not UTF-8, or contains NUL characters.
    """
    data = _content(key, path)
    encoding = next((name for mark, name in _OTHER_ENCODINGS.items() if data.startswith(mark)), None)
    if encoding is not None:
        raise unreadable(key, path, f"its byte order mark is that of {encoding}", "UTF-8 text, convert it with iconv")
    nul = data.find(b"\0")
    if nul >= 0:
        raise unreadable(key, path, f"byte {nul} is NUL, as in UTF-16 and in binary files", "UTF-8 text")
    plain = _normalized(data)
    try:
        text = plain.decode("utf-8")
    except UnicodeDecodeError as error:
        raise unreadable(key, path, str(error), "UTF-8 text") from error
    return text, Changes(data.startswith(_BOM), data.count(b"\r"))


def identity(key: str, path: Path) -> str:
    """A hash of a file's normalized text; of a compressed file, the hash of its bytes.

    Raises: ValueError if the file is missing.
    """
    data = _bytes(key, path)
    return sha256(data if _is_compressed(data, path) else _normalized(data))


def json_lines(key: str, path: Path, text: str) -> list[str]:
    """The values of the key "text" of the lines of `text`, each a JSON object; blank lines are skipped.

    Raises: ValueError with the number of the first line that is not such an object.
    """
    texts = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                texts.append(_text_of(line))
            except ValueError as error:
                raise unreadable(key, path, f"line {number}: {error}", 'JSON lines with a "text" key') from error
    return texts


def normalized_rows(rows: list[str]) -> tuple[list[str], Changes]:
    """Rows of a data set with line feeds as line ends, and what was normalized."""
    count = sum(row.count("\r") for row in rows)
    if not count:
        return rows, Changes()
    return [_with_line_feeds(row.encode()).decode() for row in rows], Changes(line_ends=count)


def unreadable(key: str, path: Path, reason: str, expected: str) -> ValueError:
    """The error of a file that cannot be used."""
    return ValueError(f"{key}={path} cannot be read ({reason}); expected {expected}")


def _text_of(line: str) -> str:
    """The text of one JSON line.

    Raises: ValueError with the reason if there is none.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # Python converts integers of at most 4300 digits
        raise ValueError("too deeply nested, or a number with too many digits") from error
    if not isinstance(value, dict):
        raise ValueError(f"{_KINDS[type(value)]}, not an object")
    if "text" not in value:
        raise ValueError('no key "text"')
    text: Any = value["text"]
    if not isinstance(text, str):
        raise ValueError(f'"text" is {_KINDS.get(type(text), "an object")}, not a string')
    surrogate = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if surrogate is not None:
        raise ValueError(f"\\u{ord(surrogate):04x} is half of a surrogate pair, not a character")
    return text


def _content(key: str, path: Path) -> bytes:
    """The decompressed bytes of a file."""
    data = _bytes(key, path)
    try:
        return gzip.decompress(data) if _is_compressed(data, path) else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise unreadable(key, path, str(error), "a complete gzip file") from error


def _bytes(key: str, path: Path) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
    except (OSError, ValueError) as error:  # no permission, a name that is too long, NUL in a name
        raise unreadable(key, path, getattr(error, "strerror", None) or str(error), "a text file") from error
    raise Refusal(f"{key}={path} is not a file; expected a text file, relative to {Path.cwd()}")


def _is_compressed(data: bytes, path: Path) -> bool:
    return path.suffix == ".gz" or data.startswith(_GZIP)  # UTF-8 text never begins with these two bytes


def _normalized(data: bytes) -> bytes:
    return _with_line_feeds(data.removeprefix(_BOM))


def _with_line_feeds(data: bytes) -> bytes:
    """UTF-8 text whose line ends are line feeds: only line ends have these bytes."""
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
