"""Models that a Python package contains as a GGUF file, converted once to safetensors in the user's cache.

The name of a cache folder contains the hash of the GGUF file, the converter's version and the seed of factors. Its
manifest contains the hash of each file in it. The files are verified before the first load, and again after the size or
time of a file changes. A conversion is written to a temporary folder and then renamed, so the cache folder is either
complete or absent.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.models import gguf_reading
from harness.models.off_grid import take_off_grid
from harness.models.packaged import Packaged, find
from harness.utils.digests import file_sha256
from harness.utils.disk_cache import cache_dir
from harness.utils.files import replacing

MANIFEST = "ptqbench.json"
_VERIFIED = "verified.json"
CONVERTER = 2  # increase it when the conversion changes: old caches are then not used
_MIB = 2**20


@functools.cache
def folder(package: str, factor_seed: int | None = None) -> Path:
    """The verified transformers folder of the model in `package` ("name==version").

    With `factor_seed`, the weights are off their quantization grid (`harness.models.off_grid`).
    Raises: ValueError if the package is not installed or has another version, the cache cannot be written, or factors
    change the logits.
    """
    packaged = find(package)
    factors = "" if factor_seed is None else f"-factors{factor_seed}"
    stem = packaged.name.removesuffix(".gguf")
    target = cache_dir() / "models" / f"{stem}-{packaged.sha256[:16]}-v{CONVERTER}{factors}"
    if _intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not _intact(target):
                _convert_into(packaged, factor_seed, target)
    except OSError as error:
        raise ValueError(
            f"PTQBENCH_CACHE={cache_dir()} cannot be written ({error.strerror or error}); "
            "set PTQBENCH_CACHE to a folder with room for the converted model"
        ) from error
    return target


def manifest(target: Path) -> dict[str, Any]:
    """The manifest of a conversion.

    Its keys: name, hash and tensor types of the GGUF file, a file with terms of use, the seed of the factors with the
    errors of the logits, and the hash of each written file.
    """
    content: dict[str, Any] = json.loads((target / MANIFEST).read_text())
    return content


def note(converted: dict[str, Any]) -> str:
    """What a reader of results must know about the weights of a conversion, from its manifest."""
    types = ", ".join(f"{count} x {name}" for name, count in converted["tensor_types"].items())
    text = f"float weights dequantized from {converted['gguf']} ({types}): the float baseline was quantized before"
    if factors := converted["factors"]:
        text += (
            f"; random channel factors (seed {factors['seed']}) take them off their grid, the logits differ by "
            f"{factors['rounded']:.1e}"
        )
    return text + (f"; terms of use: {converted['terms']}" if converted["terms"] else "")


def _intact(target: Path) -> bool:
    """Whether all files of a conversion have the hashes of its manifest; remembers the result by size and time."""
    try:
        files = manifest(target)["files"]
        stamps = {name: [digest, *_stamp(target / name)] for name, digest in files.items()}
        if stamps == _verified(target):
            return True
        if any(file_sha256(target / name) != digest for name, digest in files.items()):
            return False
    except (OSError, ValueError, KeyError):
        return False
    with (
        suppress(OSError),
        replacing(target / _VERIFIED) as part,
    ):  # if it fails, the files are verified again next time
        part.write_text(json.dumps(stamps))
    return True


def _stamp(file: Path) -> tuple[int, int]:
    """Size and modification time of a file; while they do not change, its content is assumed not to change."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _verified(target: Path) -> Any:
    """Hash, size and time of each file at the last verification; None before the first."""
    file = target / _VERIFIED
    return json.loads(file.read_text()) if file.exists() else None


def _convert_into(packaged: Packaged, factor_seed: int | None, target: Path) -> None:
    """Convert into `target`, after removing the remains of killed or damaged conversions; call it under the lock."""
    for leftover in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(leftover)
    if target.exists():
        shutil.rmtree(target)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        with tempfile.TemporaryDirectory(dir=part) as joined:
            gguf = packaged.whole(Path(joined))
            content: dict[str, Any] = {
                "gguf": packaged.name,
                "gguf_sha256": packaged.sha256,
                "tensor_types": _tensor_types(gguf),
            }
            content |= {"converter": CONVERTER, "terms": _show_terms(packaged)}
            content |= {"factors": _convert(gguf, part, factor_seed)}
        content["files"] = {file.name: file_sha256(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(content, indent=1))
        part.chmod(0o755)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _show_terms(packaged: Packaged) -> str | None:
    """Say on stderr where terms of use are.

    Returns: the file of terms, as a path in its package; None if there is none.
    """
    if packaged.terms is None:
        return None
    sys.stderr.write(f"{packaged.name} has terms of use, which apply to you: {packaged.terms}\n")
    return "/".join(packaged.terms.parts[-3:])


def _tensor_types(gguf: Path) -> dict[str, int]:
    """Number of tensors of each GGUF type.

    Raises: OSError if the disk has no space for all of them as float32.
    """
    tensors = gguf_reading.opened(gguf).tensors
    needed = sum(4 * int(tensor.n_elements) for tensor in tensors) + 16 * _MIB
    free = shutil.disk_usage(cache_dir()).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no disk space: {needed // _MIB} MiB needed, {free // _MIB} MiB free")
    return dict(Counter(tensor.tensor_type.name for tensor in tensors))


def _convert(gguf: Path, part: Path, factor_seed: int | None) -> dict[str, Any] | None:
    """Write config, tokenizer and float32 weights of a GGUF file into the folder `part`.

    Tied weights are stored once, as the embedding, which is the name that other programs read.
    Returns: the seed of the factors and the relative errors of the logits; None without factors.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from harness.models.loading import decoded_gguf

    logging.disable_progress_bar()
    with gguf_reading.once():
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(part)
    model = decoded_gguf(gguf)
    errors = None if factor_seed is None else take_off_grid(model.eval(), factor_seed)
    model.config.save_pretrained(part)
    save_file(_tensors(model), part / "model.safetensors", metadata={"format": "pt"})
    return None if errors is None else {"seed": factor_seed, "exact": errors[0], "rounded": errors[1]}


def _tensors(model: Any) -> dict[str, Any]:
    """The tensors of a model's state, tied ones once under their first name: the embedding's."""
    first = {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}
    return {name: tensor for name, tensor in model.state_dict().items() if name in first}
