"""A model in llama.cpp (llama-cpp-python 0.3.36): its GGUF file in several types, and its timed calls."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MARGIN = 8  # tokens of the context that stay free


class Llama:
    """A GGUF file, and its workload: a prompt (1, P), and the tokens (1, steps) that are decoded after it.

    With `repacked`, llama.cpp may store weights in the order that its fastest kernels read.
    Raises: ValueError if llama.cpp cannot load the file.
    """

    def __init__(self, file: Path, prompt: Tensor, decoded: Tensor, repacked: bool) -> None:
        self.prompt, self.decoded = prompt, decoded
        self._library = library()
        size = prompt.numel() + decoded.numel() + _MARGIN
        model, self._context = opened(file, size, prompt.numel(), repacked)
        self._prompt, self._steps = _tokens(prompt), [_tokens(token) for token in decoded.flatten()]
        self._vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(model))

    def prefill(self) -> None:
        """Read the prompt into the emptied cache and compute its last logits."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._forward(self._prompt)

    def decode(self, cache: Any) -> Callable[[], None]:
        """A step after a prefill: each call adds the next of the decoded tokens and computes its logits."""
        steps = iter(self._steps)
        return lambda: self._forward(next(steps))

    def logits(self) -> Tensor:
        """The logits (V,) of the last token."""
        pointer = self._library.llama_get_logits_ith(self._context, -1)
        return torch.tensor(pointer[: self._vocabulary])

    def _forward(self, tokens: Any) -> None:
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def opened(file: Path, size: int, batch: int, repacked: bool = False) -> tuple[Any, Any]:
    """The model in a file, and a context of `size` tokens that reads up to `batch` at once.

    Raises: ValueError if llama.cpp cannot load the file.
    """
    options = library().llama_model_default_params()
    options.use_extra_bufts, options.n_gpu_layers = repacked, 0
    model = library().llama_model_load_from_file(str(file).encode(), options)
    settings = library().llama_context_default_params()
    settings.n_ctx = size
    settings.n_batch = settings.n_ubatch = batch
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = library().llama_init_from_model(model, settings) if model else None
    if not context:
        raise ValueError(f"llama.cpp cannot load {file.name}")
    return model, context


def write(source: Path, file: Path, name: str) -> Path:
    """Write the weights of a GGUF file in another type, such as Q4_K_M. Returns: the file.

    Raises: ValueError if llama.cpp cannot write it.
    """
    options = library().llama_model_quantize_default_params()
    options.nthread, options.allow_requantize = torch.get_num_threads(), True
    options.ftype = getattr(library(), f"LLAMA_FTYPE_{'ALL' if name == 'F32' else 'MOSTLY'}_{name}")
    if status := library().llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(options)):
        raise ValueError(f"llama_model_quantize to {name} returned {status}")
    return file


@functools.cache
def library() -> Any:
    """llama_cpp, made silent.

    Raises: ImportError if it is not installed.
    """
    import llama_cpp

    llama_cpp.llama_log_set(_SILENT, None)
    return llama_cpp


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def _tokens(tokens: Tensor) -> Any:
    return (ctypes.c_int32 * tokens.numel())(*tokens.flatten().tolist())
