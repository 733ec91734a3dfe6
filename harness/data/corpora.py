"""Sources of text: the documents of each corpus, read from a Python package, a hub or a local file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.config import DataConfig
from harness.data import texts
from harness.data.texts import Changes
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
_BLANK = " \n"  # a row of WikiText's files that the hub has as an empty text


@dataclass(frozen=True)
class Documents:
    """The documents of one part of a corpus, and what a reader of the record must know about them."""

    texts: list[str]
    warnings: tuple[str, ...] = ()


def documents(cfg: DataConfig, part: Part) -> Documents:
    """The documents of one part; most sources are one document, joined as their protocol says.

    WikiText is the text of its file in llama.cpp's protocol, and its rows apart in the others.

    Raises: ValueError if a file is missing, empty or not text, or a hub cannot be reached.
    """
    key, path = _path(cfg, part)
    source = source_of(cfg, part)
    documents, changes = _documents(source, part, key, path)
    if source == "wikitext2" and not (cfg.protocol == "llamacpp" and part == "evaluation"):
        documents = [wikitext_join(text) for text in documents]
    if not any(text.strip() for text in documents):
        raise ValueError(f"{key}={path} contains no text; expected a file with more than white space")
    if source == "c4" and part == "evaluation":
        documents = [" ".join(documents[:C4_EVALUATION_DOCUMENTS])]
    normalized = f"{key}={describe(cfg, part)}: {changes}; the hashes are those of the normalized text"
    return Documents(documents, (normalized,) if str(changes) else ())


def identity(cfg: DataConfig, part: Part) -> str:
    """Identifies the text of one part without loading it from a hub: a hash of its content, or its name on the hub."""
    key, path = _path(cfg, part)
    if path is not None:
        return texts.identity(key, Path(path))
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
    parts = [_new_paragraphs(topics[name], earlier) for name in sorted(topics)]
    half, length, cut = sum(map(len, parts)) / 2, 0, 0
    while length < half:
        length += len(parts[cut])
        cut += 1
    return "\n\n".join(parts[:cut] if part == "calibration" else parts[cut:])


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


def _documents(source: str, part: Part, key: str, path: str | None) -> tuple[list[str], Changes]:
    """The documents of a file, a package or a hub, and what was normalized in them."""
    if path is not None:
        return _file_documents(source, key, Path(path))
    if source == "pydocs":
        return [pydocs(part)], Changes()
    if source == "wikitext2":
        rows, changes = texts.normalized_rows(
            _hub_rows(key, *WIKITEXT, split="train" if part == "calibration" else "test")
        )
        return ["".join(row or _BLANK for row in rows)], changes
    if source == "c4":
        return _hub_rows(key, "allenai/c4", split="train", data_files={"train": C4_SHARDS[part]}), Changes()
    raise ValueError(f"{key}=None; data={source} has no {part} text, expected {key}=FILE")


def _file_documents(source: str, key: str, path: Path) -> tuple[list[str], Changes]:
    text, changes = texts.read(key, path)
    if source == "c4":
        return texts.json_lines(key, path, text), Changes()  # line ends and marks are not part of the documents
    return [text], changes


def _hub_rows(key: str, *name: str, split: str, data_files: dict[str, str] | None = None) -> list[str]:
    import datasets

    datasets.disable_progress_bars()

    def load() -> list[str]:
        return list(datasets.load_dataset(*name, split=split, data_files=data_files)["text"])

    return reach(
        load, f"{key}=None, whose default is {name[0]}", f"give a local copy as {key}=FILE, or use data=pydocs"
    )
