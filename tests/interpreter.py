"""Triton's interpreter, mended where numpy has moved on."""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Let kernels loop up to a bound known at run time, which triton 3.6 reads by int() of an array: numpy 2.4 refuses.

    Nothing happens without triton, which is an extra.
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
