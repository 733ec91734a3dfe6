"""A folder in the format of transformers: its config.json, and the tensors in its files, before any is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harness.utils.digests import file_sha256
from harness.utils.errors import Refusal
from harness.utils.explain import OneLineError, explain, is_memory, reason

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
DOWNLOAD = "expected a transformers folder, download it again"

SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_READ = (SINGLE[0], _INDEXES[0], SINGLE[1], _INDEXES[1])  # the order in which transformers looks for them
_HASHED = (".safetensors", ".bin", ".json", ".model", ".txt")
_LFS = b"version https://git-lfs"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointError(Exception):
    """A checkpoint that is refused: what the problem is, details, and what to do; `reading` adds the key and value."""

    def __init__(self, problem: str, detail: str, remedy: str) -> None:
        super().__init__(problem, detail, remedy)
        self.problem, self.detail, self.remedy = problem, detail, remedy


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its torch dtype, or the file format's name of a dtype that is no float of 16 bits or more."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


@contextmanager
def reading(subject: str, remedy: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn every exception into one line that begins with `subject`, such as `model.path=FOLDER`.

    `remedy` says what to do about an exception of a library; exceptions of the classes in `passing` are not changed.
    Raises: ValueError instead of any other exception.
    """
    complete: tuple[type[Exception], ...] = (OneLineError, Refusal, *passing)
    try:
        yield
    except complete:
        raise
    except CheckpointError as error:
        raise explain(subject, error.problem, error.detail, error.remedy) from error
    except Exception as error:  # libraries raise many classes of exceptions, and all of them mean the same here
        if is_memory(error):
            raise explain(subject, "does not fit into memory", reason(error), "use a smaller model.dtype") from error
        detail = reason(error).replace(f"{subject.partition('=')[2]}/", "")
        if "trust_remote_code" in detail:
            detail = "it needs custom code, which is never run"
        raise explain(subject, "cannot be read", detail, remedy) from error


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises: CheckpointError if the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        detail = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise CheckpointError("cannot be read", f"{file.name} {detail}", DOWNLOAD) from error
    if not isinstance(content, dict):
        raise CheckpointError("cannot be read", f"{file.name} holds no mapping", DOWNLOAD)
    return content


def check_merged(folder: Path) -> None:
    """Raises: CheckpointError if a folder holds an adapter, which transformers would load or ignore, without a word."""
    if (folder / _ADAPTER).is_file():
        detail = f"{_ADAPTER} says that it is an adapter"
        raise CheckpointError("cannot be read", detail, "merge the adapter into its model, and save that")


def weight_files(folder: Path) -> list[Path]:
    """The files from which transformers reads the weights: one file, or those of an index; empty if there are none.

    Raises: CheckpointError if an index has no list of files.
    """
    name = next((name for name in _READ if (folder / name).is_file()), None)
    if name is None:
        return []
    if name in SINGLE:
        return [folder / name]
    shards = read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError("cannot be read", f"{name} has no weight_map", DOWNLOAD)
    return [folder / shard for shard in sorted(set(map(str, shards.values())))]


def tensors(folder: Path, partial: bool = False) -> dict[str, Stored]:
    """The tensors in the weight files of a folder, by name; `partial` allows missing files, which will be downloaded.

    Raises: CheckpointError if a file is missing, incomplete or no checkpoint.
    """
    files = weight_files(folder)
    if not files and not partial:
        detail = f"it has no {SINGLE[0]}, {SINGLE[1]} or index of several files"
        raise CheckpointError("cannot be read", detail, DOWNLOAD)
    stored = dict[str, Stored]()
    for file in files:
        if not file.is_file():
            if partial:
                continue
            absent = sum(not file.is_file() for file in files)
            detail = f"{file.name} is missing, {absent} of the {len(files)} weight files are"
            raise CheckpointError("cannot be read", detail, DOWNLOAD)
        stat = file.stat()
        stored |= _header(file, stat.st_size, stat.st_mtime_ns)
    return stored


@cache
def _header(file: Path, _size: int, _time: int) -> Mapping[str, Stored]:
    """The tensors in one file; the weights are not read. Cached, and read again when its size or time changes."""
    with file.open("rb") as stream:
        start = stream.read(len(_LFS))
    if start == _LFS:
        detail = f"{file.name} is a git-lfs pointer, not weights"
        raise CheckpointError("cannot be read", detail, "run `git lfs pull` in the folder's repository")
    try:
        return _safetensors_header(file) if file.suffix == ".safetensors" else _pickle_header(file)
    except Exception as error:  # neither library documents which exceptions it raises
        detail = f"{file.name} is damaged or in another format: {reason(error)}"
        raise CheckpointError("cannot be read", detail, DOWNLOAD) from error


def _safetensors_header(file: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a mapping)
        return {
            name: Stored(_DTYPES.get(piece.get_dtype(), piece.get_dtype()), tuple(piece.get_shape()))
            for name, piece in slices.items()
        }


def _pickle_header(file: Path) -> dict[str, Stored]:
    content = torch.load(file, map_location="meta", weights_only=True)
    return {
        name: Stored(tensor.dtype if tensor.dtype in FLOATS else str(tensor.dtype), tuple(tensor.shape))
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def fingerprint(folder: Path) -> str:
    """One hash of the files in a folder that decide what is loaded."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _HASHED and file.is_file()]
    stats = [(file, file.stat()) for file in files]
    return _hash_files(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@cache
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """One hash of the names and contents of files; cached, and read again when a size or time changes."""
    digest = hashlib.sha256()
    for file, _size, _time in files:
        digest.update(f"{file.name}:{file_sha256(file)};".encode())
    return digest.hexdigest()
