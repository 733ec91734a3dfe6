"""A digest of source code: of some modules and of all modules that they import, directly or indirectly.

The digest of a module is that of its syntax tree without docstrings, comments, imports, annotations and `__all__`.
Therefore it changes only with the computation, and stays the same if the file is moved. An import of a name that a
package re-exports is followed to the module that defines the name, so that it does not reach the whole package. C++
sources in the folders of these modules are included, without their comments.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from harness.utils.syntax import code_digest, statements

_NATIVE = (".cpp", ".cc", ".h", ".hpp", ".cu", ".cuh")
_CPP_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')', re.DOTALL)
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Module:
    """A Python file; `name` is its dotted name, without `__init__` for a package."""

    name: str
    file: Path

    @property
    def is_package(self) -> bool:
        return self.file.name == "__init__.py"

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.file.read_bytes(), str(self.file))

    @cached_property
    def imports(self) -> list[tuple[str, str | None, str]]:
        """All imports, also in functions: the module, the name imported from it or None, and the name that is bound."""
        return [bound for statement in statements(self.tree) for bound in self._bound(statement)]

    def _bound(self, statement: ast.AST) -> Iterator[tuple[str, str | None, str]]:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                yield alias.name, None, alias.asname or alias.name
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield self._absolute(statement), alias.name, alias.asname or alias.name

    def _absolute(self, statement: ast.ImportFrom) -> str:
        """The dotted name of the module of a `from` import, which may be relative."""
        if not statement.level:
            return statement.module or ""
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        parents = package[: len(package) - (statement.level - 1)]
        return ".".join([*parents, *([statement.module] if statement.module else [])])

    @cached_property
    def digest(self) -> str:
        """Hash of the code of this module alone; empty if there are only docstrings and imports."""
        return code_digest(self.tree)


@dataclass
class Sources:
    """The modules in some folders and their sub-folders, found as Python finds them.

    places    the folders, in the order of Python's path
    packages  top-level packages to follow in folders of installed libraries; other libraries are not followed
    """

    places: tuple[Path, ...]
    packages: frozenset[str] = frozenset()
    _modules: dict[str, Module | None] = field(default_factory=dict)
    _digests: dict[object, str] = field(default_factory=dict)

    def module(self, name: str) -> Module | None:
        """The module `name`; None if it is in none of the folders, or belongs to a library."""
        if name not in self._modules:
            self._modules[name] = self._find(name)
        return self._modules[name]

    def closure(self, roots: Iterable[str], without: Collection[str] = ()) -> dict[str, Module]:
        """The modules `roots` and all that they import, directly or indirectly, by name. `without` is left out."""
        waiting, reached = list(roots), dict[str, Module]()
        while waiting:
            name = waiting.pop()
            module = self.module(name)
            if module is None or name in reached or name in without:
                continue
            reached[name] = module
            waiting += [target for source, imported, _ in module.imports for target in self._defining(source, imported)]
        return reached

    def digest(self, roots: Iterable[str], without: Collection[str] = ()) -> str:
        """A hash, 16 hexadecimal digits, of the code of all modules of `closure`; it does not depend on their names."""
        key = frozenset(roots), frozenset(without)
        if key not in self._digests:
            self._digests[key] = self._digest(*key)
        return self._digests[key]

    def _digest(self, roots: Iterable[str], without: Collection[str]) -> str:
        modules = self.closure(roots, without).values()
        digests = {module.digest for module in modules if module.digest}
        folders = {module.file.parent for module in modules}
        digests |= {_native_digest(file) for folder in folders for file in _native(folder)}
        return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:16]

    def _defining(self, source: str, imported: str | None) -> Iterator[str]:
        """The module that an import reaches: a name that a package re-exports leads to the module that defines it."""
        package = self.module(source)
        if package is None:
            return
        submodule = f"{source}.{imported}"
        if imported is not None and self.module(submodule) is not None:
            yield submodule
            return
        if imported is not None and package.is_package:
            for inner, name, bound in package.imports:
                if bound == imported and (inner, name) != (source, imported):
                    yield from self._defining(inner, name)
                    return
        yield source

    def _find(self, name: str) -> Module | None:
        parts = name.split(".")
        for place in self.places:
            if parts[0] not in self.packages and _has_libraries(place):
                continue
            path = place.joinpath(*parts)
            for file in (path / "__init__.py", path.with_suffix(".py")):
                if file.is_file():
                    return _module(name, file, file.stat().st_mtime_ns)
        return None


@lru_cache(maxsize=4096)
def _module(name: str, file: Path, _time: int) -> Module:
    """The same instance for the same content of a file, so that it is parsed once."""
    return Module(name, file)


@lru_cache(maxsize=256)
def _has_libraries(folder: Path) -> bool:
    """Whether a folder on Python's path has installed libraries: the standard library, or packages installed by pip."""
    return any(folder.is_relative_to(place) for place in _INSTALLED) or any(folder.glob("*.dist-info"))


def _native(folder: Path) -> list[Path]:
    """The C++ and CUDA sources in a folder."""
    return [file for file in sorted(folder.iterdir()) if file.suffix in _NATIVE]


def _native_digest(file: Path) -> str:
    """Hash of a C++ source without comments, with each run of white space as one space."""
    code = " ".join(_CPP_COMMENT.sub(lambda match: match.group(1) or " ", file.read_text()).split())
    return hashlib.sha256(code.encode()).hexdigest()
