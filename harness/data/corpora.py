"""Sources of text: the documents of each corpus, read from a Python package, a hub or a local file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from harness.config import DataConfig
from harness.utils.digests import sha256
from harness.utils.hub import reach

Encode = Callable[[str], list[int]]
Part = Literal["calibration", "evaluation"]

WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
C4_SHARDS: dict[Part, str] = {
    "calibration": "en/c4-train.00000-of-01024.json.gz",
    "evaluation": "en/c4-validation.00000-of-00008.json.gz",
}
C4_EVALUATION_DOCUMENTS = 1100


def documents(cfg: DataConfig, part: Part) -> list[str]:
    """The documents of one part; most sources are one document, joined as their protocol says.

    Raises: ValueError if a file is missing, empty or not text, or a hub cannot be reached.
    """
    key, path = _path(cfg, part)
    source = source_of(cfg, part)
    if path is not None:
        texts = _file_documents(source, key, Path(path))
    elif source == "pydocs":
        texts = [pydocs(part)]
    elif source == "wikitext2":
        split = "train" if part == "calibration" else "test"
        texts = ["\n\n".join(_hub_rows(key, *WIKITEXT, split=split))]
    elif source == "c4":
        files = {"train": C4_SHARDS[part]}
        texts = _hub_rows(key, "allenai/c4", split="train", data_files=files)
    else:
        raise ValueError(f"{key}=None; data={source} has no {part} text, expected {key}=FILE")
    if not any(text.strip() for text in texts):
        raise ValueError(f"{key}={path} contains no text; expected a file with more than white space")
    if source == "c4" and part == "evaluation":
        return [" ".join(texts[:C4_EVALUATION_DOCUMENTS])]
    return texts


def identity(cfg: DataConfig, part: Part) -> str:
    """Identifies the text of one part without loading it from a hub: a hash of its content, or its name on the hub."""
    key, path = _path(cfg, part)
    if path is not None:
        return sha256(_read_bytes(key, Path(path)))
    source = source_of(cfg, part)
    return sha256(pydocs(part).encode()) if source == "pydocs" else f"{source}:{part}"


def describe(cfg: DataConfig, part: Part) -> str:
    """Short name of the source of one part: the file's name without its folders, or corpus and part."""
    path = _path(cfg, part)[1]
    return Path(path).name if path else f"{source_of(cfg, part)}:{part}"


def source_of(cfg: DataConfig, part: Part) -> str:
    """The corpus of one part; `calibration_source` can set another one for calibration."""
    return (cfg.calibration_source if part == "calibration" else None) or cfg.source


def pydocs(part: Part) -> str:
    """The topics of Python's language reference in alphabetical order: the first or the second half of the text.

    The cut is after the topic that reaches the middle. Topics repeat long passages of other topics; each paragraph is
    kept only once, otherwise the two parts would overlap.
    """
    from pydoc_data.topics import topics

    earlier: set[str] = set()
    texts = [_new_paragraphs(topics[name], earlier) for name in sorted(topics)]
    half, length, cut = sum(map(len, texts)) / 2, 0, 0
    while length < half:
        length += len(texts[cut])
        cut += 1
    return "\n\n".join(texts[:cut] if part == "calibration" else texts[cut:])


def _new_paragraphs(topic: str, earlier: set[str]) -> str:
    """The paragraphs of `topic` that are not in `earlier`, ignoring white space; adds them to `earlier`."""
    paragraphs = []
    for paragraph in topic.split("\n\n"):
        key = " ".join(paragraph.split())
        if key not in earlier:
            earlier.add(key)
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def wikitext_join(raw: str) -> str:
    """The text of a raw WikiText file in the GPTQ protocol: the hub's rows joined by two newlines."""
    rows = raw.split("\n")
    if rows[-1] == "":
        rows.pop()
    return "\n\n".join(row + "\n" if row.strip() else "" for row in rows)


def _path(cfg: DataConfig, part: Part) -> tuple[str, str | None]:
    """The config key of the local file of one part, and its value."""
    if part == "calibration":
        return "data.calibration_path", cfg.calibration_path
    return "data.path", cfg.path


def _read_bytes(key: str, path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{key}={path} is not a file; expected a text file, relative to {Path.cwd()}")
    return path.read_bytes()


def _file_documents(source: str, key: str, path: Path) -> list[str]:
    data = _read_bytes(key, path)
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        if source == "c4":
            return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    except (
        UnicodeDecodeError,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
        json.JSONDecodeError,
        KeyError,
        TypeError,
    ) as error:
        expected = 'JSON lines with a "text" key' if source == "c4" else "UTF-8 text"
        raise ValueError(f"{key}={path} cannot be read ({error}); expected {expected}") from error
    return [wikitext_join(text) if source == "wikitext2" else text]


def _hub_rows(key: str, *name: str, split: str, data_files: dict[str, str] | None = None) -> list[str]:
    import datasets

    datasets.disable_progress_bars()

    def load() -> list[str]:
        return list(datasets.load_dataset(*name, split=split, data_files=data_files)["text"])

    return reach(
        load, f"{key}=None, whose default is {name[0]}", f"give a local copy as {key}=FILE, or use data=pydocs"
    )
