"""Where text comes from: the documents of each source, from its package, a hub or a local file."""

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
    """The documents of one part; most sources are a single one, joined as their protocol says.

    Raises: ValueError if a file is missing, is no text or is empty, or a hub cannot be reached.
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
        raise ValueError(f"{key}=None; data={source} has no {part} text of its own, expected {key}=FILE")
    if not any(text.strip() for text in texts):
        raise ValueError(f"{key}={path} holds no text; expected a file with more than white space")
    if source == "c4" and part == "evaluation":
        return [" ".join(texts[:C4_EVALUATION_DOCUMENTS])]
    return texts


def identity(cfg: DataConfig, part: Part) -> str:
    """What fixes the text of one part, without loading it from a hub: a content hash, or the hub's name."""
    key, path = _path(cfg, part)
    if path is not None:
        return sha256(_read_bytes(key, Path(path)))
    source = source_of(cfg, part)
    return sha256(pydocs(part).encode()) if source == "pydocs" else f"{source}:{part}"


def describe(cfg: DataConfig, part: Part) -> str:
    """The source of one part in a word: the file's name without its folders, or the part of a known corpus."""
    path = _path(cfg, part)[1]
    return Path(path).name if path else f"{source_of(cfg, part)}:{part}"


def source_of(cfg: DataConfig, part: Part) -> str:
    """The corpus of one part: calibration may name one of its own."""
    return (cfg.calibration_source if part == "calibration" else None) or cfg.source


def pydocs(part: Part) -> str:
    """The topics of the language reference in alphabetical order, cut at the topic that passes the middle.

    Topics repeat one another at length; each paragraph is kept once, or the two parts would overlap.
    """
    from pydoc_data.topics import topics

    seen_paragraphs: set[str] = set()
    texts = [_new_paragraphs(topics[name], seen_paragraphs) for name in sorted(topics)]
    half, seen, cut = sum(map(len, texts)) / 2, 0, 0
    while seen < half:
        seen += len(texts[cut])
        cut += 1
    return "\n\n".join(texts[:cut] if part == "calibration" else texts[cut:])


def _new_paragraphs(topic: str, seen: set[str]) -> str:
    """The paragraphs of `topic` that are not in `seen` but for white space, which then holds them too."""
    kept = []
    for paragraph in topic.split("\n\n"):
        key = " ".join(paragraph.split())
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def wikitext_join(raw: str) -> str:
    """The GPTQ protocol's text of a raw WikiText file: its rows, as the hub keeps them, joined by two newlines."""
    rows = raw.split("\n")
    if rows[-1] == "":
        rows.pop()
    return "\n\n".join(row + "\n" if row.strip() else "" for row in rows)


def _path(cfg: DataConfig, part: Part) -> tuple[str, str | None]:
    if part == "calibration":
        return "data.calibration_path", cfg.calibration_path
    return "data.path", cfg.path


def _read_bytes(key: str, path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{key}={path} is no file; expected a text file, seen from {Path.cwd()}")
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
        wanted = 'JSON lines with a "text" key' if source == "c4" else "UTF-8 text"
        raise ValueError(f"{key}={path} cannot be read ({error}); expected {wanted}") from error
    return [wikitext_join(text) if source == "wikitext2" else text]


def _hub_rows(key: str, *name: str, split: str, data_files: dict[str, str] | None = None) -> list[str]:
    import datasets

    datasets.disable_progress_bars()

    def load() -> list[str]:
        return list(datasets.load_dataset(*name, split=split, data_files=data_files)["text"])

    return reach(
        load, f"{key}=None, whose default is {name[0]}", f"give a local copy as {key}=FILE, or use data=pydocs"
    )
