"""Takes weights that were quantized before off their grid, without a change of the model's function.

Weights that were dequantized from 4 bits have 16 levels in each group. A quantizer with the same groups reproduces them
exactly, and a method that finds the levels looks better than it is. Here each channel between a producer and its
consumers gets a random factor: the producer is multiplied by it, and the consumers are divided by it. Each weight of a
consumer's row then has another factor, so the row has no common levels. The factors are not stored with the weights, so
no method can divide them out.

The factors are log-uniform in [2^-1/4, 2^1/4]. This is narrow, so that the model does not become harder to quantize; a
spread of [1/2, 2] would make it harder.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SPREAD = 0.25  # factors are 2^-SPREAD to 2^SPREAD
# Largest relative errors of the logits, both computed in float64: with float64 weights, and after rounding to float32.
SAME_EXACT, SAME_ROUNDED = 1e-12, 2e-6
_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Pair:
    """A producer, and the linears that read its outputs and nothing else.

    repeats, width  with grouped queries, `repeats` heads of `width` inputs read one head of the values; otherwise 1, 1
    """

    producer: Any
    consumers: tuple[Any, ...]
    repeats: int = 1
    width: int = 1


@torch.no_grad()
def take_off_grid(model: nn.Module, seed: int) -> tuple[float, float]:
    """Multiply random factors into all pairs of a float32 model, in place; `seed` seeds the factors.

    The computation is in float64; the weights are rounded to float32 once, at the end.
    Returns: the relative errors of the logits before and after this rounding, both computed in float64.
    Raises: ValueError if the model has no pairs, or if its logits change.
    """
    model.double()
    before = _logits(model)
    generator, blocks = random.Random(seed), 0
    for block in model.modules():
        if hasattr(block, "self_attn") and hasattr(block, "mlp"):
            blocks += 1
            for pair in pairs(block):
                fold(pair, generator)
    exact = _error(_logits(model), before)
    model.float().double()
    rounded = _error(_logits(model), before)
    model.float()
    if not (blocks and exact <= SAME_EXACT and rounded <= SAME_ROUNDED):  # also if an error is NaN
        raise ValueError(
            f"model.factor_seed={seed}: factors in {blocks} blocks change the logits by {exact:.1e}, rounded "
            f"{rounded:.1e}; expected at most {SAME_EXACT:g} and {SAME_ROUNDED:g}, use model.factor_seed=null"
        )
    return exact, rounded


def pairs(block: Any) -> Iterator[Pair]:
    """The pairs of a decoder block with the modules of Llama or Gemma; `take_off_grid` proves that they are pairs."""
    attention, mlp = block.self_attn, block.mlp
    before_mlp = getattr(block, "pre_feedforward_layernorm", None) or block.post_attention_layernorm
    yield Pair(block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj))
    yield Pair(attention.v_proj, (attention.o_proj,), _repeats(attention), attention.head_dim)
    yield Pair(before_mlp, (mlp.gate_proj, mlp.up_proj))
    yield Pair(mlp.up_proj, (mlp.down_proj,))


def _repeats(attention: Any) -> int:
    """Number of query heads that read one head of the values."""
    return int(attention.o_proj.in_features // attention.v_proj.out_features)


def fold(pair: Pair, generator: random.Random) -> None:
    """Draw a factor for each channel; multiply the producer's outputs by it and divide the consumers' columns by it.

    `random.Random` gives the same factors with every version of Python and torch.
    """
    channels = pair.producer.weight.shape[0]
    factors = torch.tensor([2 ** generator.uniform(-SPREAD, SPREAD) for _ in range(channels)], dtype=torch.float64)
    _multiply(pair.producer, factors)
    read = factors.view(-1, pair.width).repeat_interleave(pair.repeats, dim=0).flatten()
    for consumer in pair.consumers:
        consumer.weight.div_(read)


def _multiply(producer: Any, factors: Tensor) -> None:
    """Multiply the outputs (..., channels) of a linear or of a norm by `factors`."""
    weight = producer.weight
    if weight.ndim == 2:
        weight.mul_(factors[:, None])
    else:
        offset = _offset(producer)
        weight.add_(offset).mul_(factors).sub_(offset)
    if getattr(producer, "bias", None) is not None:
        producer.bias.mul_(factors)


def _offset(norm: Any) -> float:
    """c of a norm that multiplies by (weight + c): 0 in Llama, 1 in Gemma; measured."""
    weight, probe = norm.weight.clone(), torch.linspace(1, 2, len(norm.weight)).to(norm.weight)
    norm.weight.fill_(0)
    at_zero = norm(probe)
    norm.weight.fill_(1)
    gain = (at_zero / (norm(probe) - at_zero)).mean()
    norm.weight.copy_(weight)
    return round(float(gain), 3)


class _Float64(TorchFunctionMode):
    """Computes in float64 where a model asks for float32, as norms and softmax do."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _logits(model: Any) -> Tensor:
    """The logits of tokens that are spread over the vocabulary, computed in float64."""
    tokens = torch.linspace(0, model.config.vocab_size - 1, _PROBE_TOKENS).long()[None]
    with _Float64():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _error(logits: Tensor, exact: Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())
