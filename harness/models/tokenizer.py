"""The tokenizer of a model: text to token ids, with or without special tokens, and the BOS token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.models.checkpoint import CheckpointError

_SOME_TEXT = "a"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids.

    call    from a text, and whether the tokenizer adds its default special tokens, to token ids
    bos_id  id of the token that begins a sequence; None if the tokenizer has none
    """

    call: Callable[[str, bool], list[int]]
    bos_id: int | None = None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special`: with the special tokens that the tokenizer adds by default, such as BOS."""
        return self.call(text, special)

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS before a text by default."""
        return self.bos_id is not None and self.encode(_SOME_TEXT)[:1] == [self.bos_id]


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of models with random weights: each byte of the text in UTF-8 is a token; no special tokens."""
    return Tokenizer(lambda text, _special: list(text.encode()))


def check_files(tokenizer: Any, folder: Path) -> None:
    """Check that a tokenizer of transformers was read from files in `folder`.

    transformers builds an empty one for a folder without them, which turns every word into the unknown token.
    Raises: CheckpointError if a file with the vocabulary is missing.
    """
    names = {"tokenizer_file": "tokenizer.json", **tokenizer.vocab_files_names}
    needed = [names[key] for key in ("vocab_file", "merges_file") if key in names] or [names["tokenizer_file"]]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing and tokenizer.vocab_files_names and not (folder / names["tokenizer_file"]).is_file():
        detail = f"{missing[0]} of the tokenizer is missing"
        raise CheckpointError("cannot be read", detail, "save the model's tokenizer into the folder")


def pretrained_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer of transformers, `tokenizer`."""

    def call(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    return Tokenizer(call, tokenizer.bos_token_id)
