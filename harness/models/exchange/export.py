"""A quantized model in the format of another program: a folder with its weights, settings and tokenizer.

The folder is written beside its place, opened again by the reader of its format, compared with the model to the bit,
and renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from harness.core import FloatQTensor, QTensor
from harness.models.architecture import weight_of
from harness.models.checkpoint import CONFIG, CheckpointError, read_json
from harness.models.exchange.awq import AWQWriter
from harness.models.exchange.compressed_writer import CompressedWriter
from harness.models.exchange.detect import reader_of
from harness.models.exchange.folder_writer import WEIGHTS
from harness.models.exchange.gguf import GGUF, pretrained
from harness.models.exchange.gguf_writer import FILE, GGUFWriter
from harness.models.exchange.gptq import GPTQWriter
from harness.models.exchange.native import NativeWriter
from harness.models.exchange.writer import Quantized, Writer
from harness.utils.errors import LIMIT, short

WRITERS: Mapping[str, Writer] = {
    writer.name: writer for writer in (NativeWriter(), GPTQWriter(), AWQWriter(), CompressedWriter(), GGUFWriter())
}

_LAST_BITS = 2.0**-22
_LEAST = 20  # characters of a path in a message


def check(folder: Path) -> None:
    """Raises: ValueError if the folder cannot be written, or already contains a model, which is never overwritten."""
    if any((folder / name).exists() for name in (WEIGHTS, CONFIG, FILE)):
        raise ValueError(f"save={folder} already contains a model; choose another folder, or delete it")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        start, end = f"save={folder} cannot be written, because of ", "; choose another folder"
        raise ValueError(f"{start}{short(parent, max(LIMIT - len(start) - len(end), _LEAST))}{end}")


def export(quantized: Quantized, folder: Path, writer: Writer) -> None:
    """Write the model into `folder`, which must not exist or be empty.

    Raises: ValueError if the format cannot hold a weight, the folder cannot be written, or the reopened linears differ.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        writer.write(quantized, part)
        _compare(quantized, part)
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()  # `check` found no model in it; another file makes this fail
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"save={folder} cannot be written ({error}); free disk space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _compare(quantized: Quantized, folder: Path) -> None:
    """Raises: ValueError if a linear of the folder decodes to another weight."""
    try:
        decoded = _decoded(folder)
        for name, weight in quantized.linears():
            if not _same(decoded(name), weight):
                raise ValueError(f"{name} decodes to another weight after it was written; please report this")
    except CheckpointError as error:
        raise ValueError(f"the written folder cannot be read again: {error.detail}") from error


def _decoded(folder: Path) -> Callable[[str], Tensor]:
    """The decoded float32 weight (N, K) of each quantized linear of the folder.

    Raises: CheckpointError if it cannot be read.
    """
    if (folder / FILE).is_file():
        model = pretrained(GGUF(folder / FILE))
        return lambda name: weight_of(model.get_submodule(name))
    reader = reader_of(read_json(folder / CONFIG), folder)
    return lambda name: reader.read(name).weight.dequantize()


def _same(decoded: Tensor, weight: QTensor) -> bool:
    """Whether a decoded weight is that of a QTensor: to the bit, or to the last bit of a reciprocal of its scale."""
    expected = weight.dequantize()
    divided = isinstance(weight, FloatQTensor) and weight.tensor_scale is not None
    return torch.allclose(decoded, expected, rtol=_LAST_BITS, atol=0) if divided else torch.equal(decoded, expected)
