"""A digest of Python code that changes only with the computation: not with comments, docstrings, imports or types."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator


def code_digest(tree: ast.Module) -> str:
    """Hash of the code of a syntax tree; empty if there are only docstrings and imports."""
    code = _written(tree)
    return hashlib.sha256(code.encode()).hexdigest() if code else ""


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a syntax tree, without blocks that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not _for_types(node):
            yield node
            yield from statements(node)


def _for_types(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _written(node: object) -> str:
    """A syntax tree as text that depends only on the code: without positions and empty fields."""
    if isinstance(node, list):
        return "".join(f"{_written(item)}," for item in node if not _is_silent(item))
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (
        (name, value)
        for name, value in ast.iter_fields(node)
        if name not in ("annotation", "returns", "type_comment", "kind", "type_ignores", "ctx")
        and value not in (None, [])
    )
    written = [f"{name}={text}" for name, value in fields if (text := _written(value))]
    return f"{type(node).__name__}({' '.join(written)})" if written or not isinstance(node, ast.Module) else ""


def _is_silent(node: object) -> bool:
    """Whether a statement computes nothing: an import, docstring, `__all__` or block for type checkers only."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    return isinstance(node, (ast.Import, ast.ImportFrom)) or (isinstance(node, ast.AST) and _for_types(node))
