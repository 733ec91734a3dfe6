"""A fix for Triton's interpreter with newer numpy."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Allow loop bounds that are known only at run time: triton 3.6 calls int() on an array, which numpy 2.4 refuses.

    Without triton, an optional dependency, nothing is changed.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor
    if getattr(patch, "mended", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
