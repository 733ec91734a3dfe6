"""Token windows for calibration and evaluation, with their hashes and a check that they do not overlap."""

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

_OVERLAP_TOKENS = 64  # shorter matches are quotations and headings, not shared text
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
_DRAWS_PER_SAMPLE = 1000


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids (num_windows, seq_len) int64, and the fields that describe them in the record."""

    windows: Tensor
    info: dict[str, Any]


def evaluation(cfg: DataConfig, encode: Encode) -> Tokens:
    """Windows of the evaluation text in order, adjacent or `stride` apart; an incomplete last window is dropped.

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

    Raises: ValueError if the text is too short.
    """
    documents = corpora.documents(cfg, "calibration")
    windows = _first(documents, cfg, encode) if cfg.sampling == "first" else _random(documents, cfg, encode, seed)
    digest = sha256("\n\n".join(documents).encode())
    info = {"source": corpora.describe(cfg, "calibration"), "text_sha256": digest, "sampling": cfg.sampling}
    return Tokens(windows, {**info, **_window_info(windows)})


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
    shared = overlap(calibration_tokens.windows, evaluation_tokens.windows)
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


def _first(documents: Sequence[str], cfg: DataConfig, encode: Encode) -> Tensor:
    """Consecutive sequences from the start of the text."""
    needed = cfg.num_samples * cfg.calibration_seq_len
    ids: list[int] = []
    for document in documents:
        ids += encode(document)
        if len(ids) >= needed:
            return torch.tensor(ids[:needed], dtype=torch.int64).view(cfg.num_samples, -1)
    raise ValueError(
        f"data.calibration_path={corpora.describe(cfg, 'calibration')} has {len(ids)} tokens; expected "
        f"data.num_samples={cfg.num_samples} x data.calibration_seq_len={cfg.calibration_seq_len}; lower one of them"
    )


def _random(documents: Sequence[str], cfg: DataConfig, encode: Encode, seed: int) -> Tensor:
    """GPTQ's sampling: for each sequence, a random document of more than `calibration_seq_len` tokens and an offset."""
    generator, length = random.Random(seed), cfg.calibration_seq_len
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
