"""A tokenizer of transformers as the fields `tokenizer.*` of a GGUF file.

    gpt2   BPE on bytes: tokens, their types and merges, and the rule that splits a text before
    llama  BPE on characters with bytes for unknown ones (SentencePiece): tokens, their types, and scores

Source: the package gguf; convert_hf_to_gguf.py and llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from harness.models.exchange.gguf_layout import Field

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The name of each rule that splits a text before BPE, by its steps in tokenizer.json.
_RULES = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_CONTRACTIONS + r"|\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_CONTRACTIONS + r"|\p{N}" + _REST, "bytes"): "qwen2",
}


class Vocabulary:
    """The vocabulary of a tokenizer."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        """`tokenizer` is one of transformers; the model has `size` tokens, of which it may not name all."""
        self._tokenizer = tokenizer
        self._size = size
        self._places: dict[str, int] = tokenizer.get_vocab()
        self._added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._content = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}

    @property
    def problem(self) -> str | None:
        """What llama.cpp has no name for; None if nothing."""
        kind = self._content.get("model", {}).get("type")
        if kind != "BPE":
            return f"a tokenizer of the type {kind}"
        if not self._characters and self._rule is None:
            return f"a tokenizer that splits texts by {' and '.join(self._steps) or 'nothing'}"
        return None

    def fields(self) -> Iterator[Field]:
        """All fields; `problem` must be None."""
        tokens = self._tokens
        yield "string", "tokenizer.ggml.model", "llama" if self._characters else "gpt2"
        yield "string", "tokenizer.ggml.pre", self._rule or "default"
        yield "array", "tokenizer.ggml.tokens", tokens
        yield "array", "tokenizer.ggml.token_type", [self._type(place, token) for place, token in enumerate(tokens)]
        if self._characters:
            yield "array", "tokenizer.ggml.scores", list(self._scores())
            yield "bool", "tokenizer.ggml.add_space_prefix", self._prefixes_space
        else:
            yield "array", "tokenizer.ggml.merges", [" ".join(pair) for pair in self._merges]
        yield from self._special()

    def _special(self) -> Iterator[Field]:
        for name, key in _SPECIAL.items():
            place = getattr(self._tokenizer, f"{name}_token_id")
            if place is not None and place < self._size:  # some classes of tokenizers add tokens
                yield "uint32", f"tokenizer.ggml.{key}_token_id", place
        beginning, end = self._added_around
        yield "bool", "tokenizer.ggml.add_bos_token", beginning
        yield "bool", "tokenizer.ggml.add_eos_token", end
        if isinstance(self._tokenizer.chat_template, str):
            yield "string", "tokenizer.chat_template", self._tokenizer.chat_template

    @property
    def _added_around(self) -> tuple[bool, bool]:
        """Whether BOS is put before a text, and EOS behind it."""
        tokens = self._tokenizer("a")["input_ids"]
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        first, last = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        more = len(tokens) > len(plain)
        return more and tokens[0] == first is not None, more and tokens[-1] == last is not None

    @cached_property
    def _tokens(self) -> list[str]:
        """Each token; those that the tokenizer does not name, too."""
        named = {place: token for token, place in self._places.items()}
        return [named.get(place, f"[PAD{place}]") for place in range(self._size)]

    def _type(self, place: int, token: str) -> int:
        if place in self._added:
            return _CONTROL if self._added[place].special else _USER_DEFINED
        if self._characters and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return _BYTE
        if token not in self._places:
            return _UNUSED
        return _UNKNOWN if self._characters and place == self._tokenizer.unk_token_id else _NORMAL

    @property
    def _characters(self) -> bool:
        """Whether BPE is on characters, and bytes are only for those that no token has."""
        return bool(self._content["model"].get("byte_fallback"))

    @cached_property
    def _merges(self) -> list[list[str]]:
        """Two tokens for each merge, the first merge first."""
        stored = self._content["model"]["merges"]
        return [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in stored]

    def _scores(self) -> Iterator[float]:
        """Minus the rank of each token among those that merges make; 0 for all others, which no merge makes."""
        ranks: dict[str, int] = {}
        for left, right in self._merges:
            ranks.setdefault(left + right, len(ranks))
        yield from (-float(ranks.get(token, 0)) for token in self._tokens)

    @property
    def _prefixes_space(self) -> bool:
        steps = json.dumps([self._content.get("normalizer"), self._content.get("pre_tokenizer")])
        return '"Prepend"' in steps or '"prepend_scheme": "first"' in steps or '"prepend_scheme": "always"' in steps

    @property
    def _rule(self) -> str | None:
        return None if self._characters else _RULES.get(tuple(self._steps))

    @property
    def _steps(self) -> list[str]:
        """What splits a text before BPE."""
        step = self._content.get("pre_tokenizer") or {}
        return [_step(part) for part in step.get("pretokenizers", [step] if step else [])]


def _step(part: Any) -> str:
    """One step: a pattern, digits one by one, GPT-2's words in bytes, or bytes alone."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "words" if part["use_regex"] else "bytes"
    if part["type"] == "Digits" and part["individual_digits"]:
        return "digits"
    return str(part.get("pattern", {}).get("Regex") or part["type"])
