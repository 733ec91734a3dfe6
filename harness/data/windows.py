"""Token windows for calibration and evaluation, with their hashes and a check that they do not overlap."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from harness.config import DataConfig
from harness.data import corpora
from harness.data.corpora import Encode
from harness.utils.digests import sha256

_OVERLAP_TOKENS = 64  # shorter matches are quotations and headings, not shared text
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
_DRAWS_PER_SAMPLE = 1000


class Tokenizer(Protocol):
    """What windows need of a model's tokenizer; see `harness.models.Tokenizer`."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool: ...

    def encode(self, text: str, special: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids (num_windows, seq_len) int64, the fields that describe them in the record, and warnings.

    lead  number of tokens at the start of each window that are not of the text: 1 if each window begins with BOS
    """

    windows: Tensor
    info: dict[str, Any]
    warnings: tuple[str, ...] = ()
    lead: int = 0

    @property
    def text(self) -> Tensor:
        """The windows without their BOS, (num_windows, seq_len - lead)."""
        return self.windows[:, self.lead :]


def evaluation(cfg: DataConfig, tokenizer: Tokenizer) -> Tokens:
    """Windows of the evaluation text in order, adjacent or `stride` apart; an incomplete last window is dropped.

    Protocol: GPTQ (Frantar et al. 2022; IST-DASLab/gptq datautils.py): one tokenizer call over the joined text. With
    bos=always, each window is BOS and the next seq_len - 1 tokens of the text, so that each token is scored once.
    Protocol llamacpp (llama.cpp, tools/perplexity): likewise, but BOS takes the place of each window's first token.
    Raises: ValueError if the text is shorter than one window, or bos=always and the tokenizer has no BOS.
    """
    documents = corpora.documents(cfg, "evaluation")
    (joined,) = documents.texts
    lead = _lead(cfg, tokenizer)
    ids, length = tokenizer.encode(joined, cfg.bos == "protocol"), cfg.seq_len - len(lead)
    total, stride = len(ids), cfg.stride or length
    count = (total - length) // stride + 1
    if count < 1:
        raise ValueError(
            f"data.path={corpora.describe(cfg, 'evaluation')} has {total} tokens, fewer than one window of "
            f"data.seq_len={cfg.seq_len}; use a longer text, or a smaller data.seq_len"
        )
    used = count if cfg.max_windows is None else min(count, cfg.max_windows)
    ids = ids[: (used - 1) * stride + length]
    windows = _with_lead(lead, torch.tensor(ids, dtype=torch.int64).unfold(0, length, stride))
    replaced = cfg.protocol == "llamacpp" and tokenizer.adds_bos
    if replaced:
        windows[:, 0] = torch.tensor(tokenizer.bos_id)
    info: dict[str, Any] = {"source": corpora.describe(cfg, "evaluation"), "text_sha256": sha256(joined.encode())}
    info |= {"text_tokens": total, **_bos_info(cfg, tokenizer, "every window" if replaced else "first window")}
    info |= _window_info(windows)
    lacking = not replaced and cfg.bos != "always" and tokenizer.adds_bos and (used > 1 or cfg.bos == "never")
    warnings = (*documents.warnings, _no_bos(cfg, used)) if lacking else documents.warnings
    return Tokens(windows, info, warnings, len(lead))


def calibration(cfg: DataConfig, tokenizer: Tokenizer, seed: int) -> Tokens:
    """`num_samples` sequences of `calibration_seq_len` tokens, sampled as `cfg.sampling` says.

    With bos=always, each is BOS and calibration_seq_len - 1 tokens of the text.
    Raises: ValueError if the text is too short, or bos=always and the tokenizer has no BOS.
    """
    source = corpora.documents(cfg, "calibration")
    documents = source.texts
    lead = _lead(cfg, tokenizer)
    length = cfg.calibration_seq_len - len(lead)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, cfg.bos == "protocol")

    rows = (
        _first(documents, cfg, encode, length)
        if cfg.sampling == "first"
        else _random(documents, cfg, encode, length, seed)
    )
    windows = _with_lead(lead, rows)
    digest = sha256("\n\n".join(documents).encode())
    info = {"source": corpora.describe(cfg, "calibration"), "text_sha256": digest, "sampling": cfg.sampling}
    at_start = len(documents) == 1 and cfg.sampling == "first"
    info |= _bos_info(cfg, tokenizer, "first window" if at_start else "each document")
    return Tokens(windows, {**info, **_window_info(windows)}, source.warnings, len(lead))


def _lead(cfg: DataConfig, tokenizer: Tokenizer) -> list[int]:
    """The tokens before the text in each window: BOS with bos=always, otherwise none."""
    if cfg.bos != "always":
        return []
    if tokenizer.bos_id is None:
        raise ValueError("data.bos=always: the tokenizer of this model has no BOS token; expected protocol or never")
    return [tokenizer.bos_id]


def _with_lead(lead: list[int], rows: Tensor) -> Tensor:
    """Windows (W, L + T) of the rows (W, T), each with the L tokens `lead` before it."""
    return torch.cat([torch.tensor(lead, dtype=torch.int64).expand(len(rows), -1), rows], 1)


def _bos_info(cfg: DataConfig, tokenizer: Tokenizer, protocol: str) -> dict[str, Any]:
    """The fields `bos` and `bos_id` of the record; `protocol` says where the tokenizer's BOS stands in the protocol."""
    if cfg.bos == "never" or (cfg.bos == "protocol" and not tokenizer.adds_bos):
        return {"bos": "none", "bos_id": None}
    return {"bos": "every window" if cfg.bos == "always" else protocol, "bos_id": tokenizer.bos_id}


def _no_bos(cfg: DataConfig, used: int) -> str:
    """The warning that windows lack the BOS which the tokenizer adds."""
    lacking = "windows have none" if cfg.bos == "never" else f"windows 2 to {used} have none"
    return (
        f"data.bos={cfg.bos}: the tokenizer adds BOS, {lacking}; models that need it score worse, use data.bos=always"
    )


def overlap(calibration_windows: Tensor, evaluation_windows: Tensor) -> int:
    """Number of positions in the calibration windows that start a run of tokens also present in the evaluation text.

    A run is 64 tokens, or a whole calibration window if that is shorter.
    """
    length = min(_OVERLAP_TOKENS, calibration_windows.shape[1], evaluation_windows.numel())
    evaluation_hashes = _rolling_hashes(evaluation_windows.reshape(1, -1), length)
    return int(np.isin(_rolling_hashes(calibration_windows, length), evaluation_hashes).sum())


def check_overlap(cfg: DataConfig, calibration_tokens: Tokens, evaluation_tokens: Tokens) -> str | None:
    """None if the texts do not overlap; a warning if they do and the configuration allows it.

    Raises: ValueError if they overlap and `data.allow_overlap` is false.
    """
    shared = overlap(calibration_tokens.text, evaluation_tokens.text)
    if not shared:
        return None
    sources = calibration_tokens.info["source"], evaluation_tokens.info["source"]
    overlapping = f"calibration text {sources[0]} shares {shared} runs of tokens with evaluation text {sources[1]}"
    if not cfg.allow_overlap:
        raise ValueError(
            f"data.calibration_path: {overlapping}; choose another text, or set data.allow_overlap=true to record "
            "the overlap as a warning"
        )
    return f"data.allow_overlap=true: {overlapping}, so perplexity is too low"


def _window_info(windows: Tensor) -> dict[str, Any]:
    return {
        "num_windows": windows.shape[0],
        "seq_len": windows.shape[1],
        "tokens_sha256": sha256(windows.numpy().astype("<i8").tobytes()),
    }


def _first(documents: Sequence[str], cfg: DataConfig, encode: Encode, length: int) -> Tensor:
    """Consecutive rows of `length` tokens from the start of the text."""
    needed = cfg.num_samples * length
    ids: list[int] = []
    for document in documents:
        ids += encode(document)
        if len(ids) >= needed:
            return torch.tensor(ids[:needed], dtype=torch.int64).view(cfg.num_samples, -1)
    raise ValueError(
        f"data.calibration_path={corpora.describe(cfg, 'calibration')} has {len(ids)} tokens; expected "
        f"data.num_samples={cfg.num_samples} x data.calibration_seq_len={cfg.calibration_seq_len}; lower one of them"
    )


def _random(documents: Sequence[str], cfg: DataConfig, encode: Encode, length: int, seed: int) -> Tensor:
    """GPTQ's sampling: for each row, a random document of more than `length` tokens and an offset."""
    generator = random.Random(seed)
    only = encode(documents[0]) if len(documents) == 1 else None
    rows: list[list[int]] = []
    for _ in range(_DRAWS_PER_SAMPLE * cfg.num_samples):
        ids = only if only is not None else encode(documents[generator.randint(0, len(documents) - 1)])
        if len(ids) > length:
            start = generator.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
        if len(rows) == cfg.num_samples:
            return torch.tensor(rows, dtype=torch.int64)
    raise ValueError(
        f"data.calibration_path={corpora.describe(cfg, 'calibration')} has too few documents of more than "
        f"data.calibration_seq_len={cfg.calibration_seq_len} tokens; lower it"
    )


def _rolling_hashes(windows: Tensor, length: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A polynomial hash modulo 2^64 of each run of `length` tokens within a row, flattened."""
    ids = windows.numpy().astype(np.uint64)
    spans = ids.shape[1] - length + 1
    hashes = np.zeros((ids.shape[0], spans), dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _HASH_BASE + ids[:, offset : offset + spans] + np.uint64(1)
    return hashes.ravel()
