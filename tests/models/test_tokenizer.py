"""Tokenizers: special tokens on request, and whether BOS is added by default."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from harness.models.tokenizer import Tokenizer, byte_tokenizer, pretrained_tokenizer

IDS = {"<s>": 0, "a": 1, "b": 2}


def tokenizer(bos: bool, adds: bool) -> Tokenizer:
    inner = Inner(models.WordLevel(vocab=IDS, unk_token="b"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    options = {"bos_token": "<s>"} if bos else {}
    return pretrained_tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, **options))


@pytest.mark.parametrize(("bos", "adds"), [(False, False), (True, False), (True, True)])
def test_a_tokenizer_says_whether_it_adds_bos(bos: bool, adds: bool) -> None:
    subject = tokenizer(bos, adds)
    assert (subject.bos_id, subject.adds_bos) == (0 if bos else None, adds)
    assert subject.encode("a b") == ([0, 1, 2] if adds else [1, 2])
    assert subject.encode("a b", special=False) == [1, 2]


def test_bytes_are_tokens_without_special_ones() -> None:
    subject = byte_tokenizer()
    assert subject.encode("é") == subject.encode("é", special=False) == [0xC3, 0xA9]
    assert (subject.bos_id, subject.adds_bos) == (None, False)
