"""Token batches for calibration and the evaluation stream, hashed, and proved not to overlap."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.config import DataConfig
from harness.data import corpora
from harness.data.corpora import Encode
from harness.utils.digests import sha256

_OVERLAP_TOKENS = 64  # shorter agreements are quotations and headings, not shared text
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
_DRAWS_PER_SAMPLE = 1000


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids (num_windows, seq_len) int64, and what the record says of them."""

    windows: Tensor
    info: dict[str, Any]


def evaluation(cfg: DataConfig, encode: Encode) -> Tokens:
    """Windows of the evaluation text in order, side by side or `stride` apart; the tail that fills none is dropped.

    Protocol: GPTQ (Frantar et al. 2022; IST-DASLab/gptq datautils.py): one tokenizer call over the joined text.
    Raises: ValueError if the text is shorter than one window.
    """
    (joined,) = corpora.documents(cfg, "evaluation")
    ids = encode(joined)
    total, stride = len(ids), cfg.stride or cfg.seq_len
    count = (total - cfg.seq_len) // stride + 1
    if count < 1:
        raise ValueError(
            f"data.path={corpora.describe(cfg, 'evaluation')} has {total} tokens, fewer than one window of "
            f"data.seq_len={cfg.seq_len}; use a longer text, or a smaller data.seq_len"
        )
    used = count if cfg.max_windows is None else min(count, cfg.max_windows)
    ids = ids[: (used - 1) * stride + cfg.seq_len]
    windows = torch.tensor(ids, dtype=torch.int64).unfold(0, cfg.seq_len, stride).contiguous()
    info = {"source": corpora.describe(cfg, "evaluation"), "text_sha256": sha256(joined.encode())}
    return Tokens(windows, {**info, "text_tokens": total, **_window_info(windows)})


def calibration(cfg: DataConfig, encode: Encode, seed: int) -> Tokens:
    """`num_samples` sequences of `calibration_seq_len` tokens, sampled as `cfg.sampling` says.

    Raises: ValueError if the text is too short for them.
    """
    documents = corpora.documents(cfg, "calibration")
    windows = _first(documents, cfg, encode) if cfg.sampling == "first" else _random(documents, cfg, encode, seed)
    digest = sha256("\n\n".join(documents).encode())
    info = {"source": corpora.describe(cfg, "calibration"), "text_sha256": digest, "sampling": cfg.sampling}
    return Tokens(windows, {**info, **_window_info(windows)})


def overlap(calibration_windows: Tensor, evaluation_windows: Tensor) -> int:
    """How many positions of the calibration windows start a run of tokens that evaluation holds too.

    A run is 64 tokens, or the whole calibration window if that is shorter.
    """
    length = min(_OVERLAP_TOKENS, calibration_windows.shape[1], evaluation_windows.numel())
    known = _rolling_hashes(evaluation_windows.reshape(1, -1), length)
    return int(np.isin(_rolling_hashes(calibration_windows, length), known).sum())


def check_overlap(cfg: DataConfig, calibration_tokens: Tokens, evaluation_tokens: Tokens) -> str | None:
    """None if the texts are apart; else a warning if overlap was asked for.

    Raises: ValueError if they overlap and `data.allow_overlap` is false.
    """
    shared = overlap(calibration_tokens.windows, evaluation_tokens.windows)
    if not shared:
        return None
    found = f"calibration text {calibration_tokens.info['source']} shares {shared} runs of tokens with evaluation text"
    if not cfg.allow_overlap:
        raise ValueError(
            f"data.calibration_path: {found} {evaluation_tokens.info['source']}; name another text, "
            "or set data.allow_overlap=true to have it recorded as a warning"
        )
    return f"data.allow_overlap=true: {found} {evaluation_tokens.info['source']}, so perplexity is flattered"


def _window_info(windows: Tensor) -> dict[str, Any]:
    return {
        "num_windows": windows.shape[0],
        "seq_len": windows.shape[1],
        "tokens_sha256": sha256(windows.numpy().astype("<i8").tobytes()),
    }


def _first(documents: Sequence[str], cfg: DataConfig, encode: Encode) -> Tensor:
    wanted = cfg.num_samples * cfg.calibration_seq_len
    ids: list[int] = []
    for document in documents:
        ids += encode(document)
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted], dtype=torch.int64).view(cfg.num_samples, -1)
    raise ValueError(
        f"data.calibration_path={corpora.describe(cfg, 'calibration')} has {len(ids)} tokens; expected "
        f"data.num_samples={cfg.num_samples} x data.calibration_seq_len={cfg.calibration_seq_len}; lower one of them"
    )


def _random(documents: Sequence[str], cfg: DataConfig, encode: Encode, seed: int) -> Tensor:
    """GPTQ's draw: a random document with more than `calibration_seq_len` tokens, a random offset in it."""
    draw, length = random.Random(seed), cfg.calibration_seq_len
    whole = encode(documents[0]) if len(documents) == 1 else None
    rows: list[list[int]] = []
    for _ in range(_DRAWS_PER_SAMPLE * cfg.num_samples):
        ids = whole if whole is not None else encode(documents[draw.randint(0, len(documents) - 1)])
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
        if len(rows) == cfg.num_samples:
            return torch.tensor(rows, dtype=torch.int64)
    raise ValueError(
        f"data.calibration_path={corpora.describe(cfg, 'calibration')} has too few documents of more than "
        f"data.calibration_seq_len={length} tokens; lower it"
    )


def _rolling_hashes(windows: Tensor, length: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A polynomial hash modulo 2^64 of each run of `length` tokens within a row, flattened."""
    ids = windows.numpy().astype(np.uint64)
    spans = ids.shape[1] - length + 1
    hashes = np.zeros((ids.shape[0], spans), dtype=np.uint64)
    for offset in range(length):
        hashes = hashes * _HASH_BASE + ids[:, offset : offset + spans] + np.uint64(1)
    return hashes.ravel()
