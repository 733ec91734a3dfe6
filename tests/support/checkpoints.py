"""Quantized checkpoints of a tiny model, written value by value as the formats describe it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.families import build

Parts = dict[str, Tensor]
Json = dict[str, Any]


def floats(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A folder with a float model of `family`; `folder` must not exist."""
    torch.manual_seed(0)
    build(family, **options).save_pretrained(folder)  # type: ignore[operator]
    return folder


def quantized(base: Path, folder: Path, section: Json, encode: Callable[[str, Tensor], Parts]) -> dict[str, Tensor]:
    """Write the model of `base` with the parts that `encode` makes of each linear in a block, and `section`.

    Returns: the float weights of these linears, by name.
    """
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    linears = [name for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2]
    weights = {name.removesuffix(".weight"): tensors.pop(name) for name in linears}
    for name, weight in weights.items():
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in encode(name, weight).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return weights


def grid(weight: Tensor, bits: int, size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K), scales (N, G) in float16 and zero points (N, G) of a weight, rounded to nearest."""
    groups = weight.reshape(len(weight), -1, size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    top = (1 << bits) - 1
    if symmetric:
        scale = (2 * groups.abs().amax(-1) / top).half()
        zero = torch.full_like(scale, 1 << bits - 1)
    else:
        scale = ((high - low) / top).half()
        zero = (-low / scale).round().clamp(0, top)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.reshape(weight.shape).int(), scale, zero.int()


def decoded(codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor | None = None) -> Tensor:
    """(code - zero) * scale in float32; `group` (K,) names the group of each input, by default consecutive ones."""
    size = codes.shape[1] // scale.shape[1]
    group = torch.arange(codes.shape[1]) // size if group is None else group
    return (codes - zero[:, group]).float() * scale.float()[:, group]


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """32-bit words, with a sign, of codes that follow one another from the lowest bit."""
    whole = sum(code << i * bits for i, code in enumerate(codes))
    words = [whole >> 32 * i & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def rows_of_words(matrix: Tensor, bits: int) -> Tensor:
    """Each row of a matrix of codes in words (R, W) int32."""
    return torch.tensor([bit_stream(row, bits) for row in matrix.tolist()], dtype=torch.int64).to(torch.int32)


def gptq(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, version: int = 1) -> Parts:
    """The parts of a linear in a GPTQ checkpoint; version 1 stores zero points minus 1."""
    stored = (zero - (1 if version == 1 else 0)) % (1 << bits)
    return {
        "qweight": rows_of_words(codes, bits).t(),
        "qzeros": rows_of_words(stored.t(), bits),
        "scales": scale.t(),
        "g_idx": (torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])).int(),
    }


def awq(codes: Tensor, scale: Tensor, zero: Tensor) -> Parts:
    """The parts of a linear in an AWQ checkpoint."""

    def packed(matrix: Tensor) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        shuffled = matrix.reshape(len(matrix), -1, 8)[..., order].flatten(1)
        return rows_of_words(shuffled, 4)

    return {"qweight": packed(codes.t()), "qzeros": packed(zero.t()), "scales": scale.t()}


def with_tokenizer(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> Path:
    """The folder, with a tokenizer of bytes, and of the pairs of `merges`, added."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = alphabet | {"".join(pair): len(alphabet) + place for place, pair in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
