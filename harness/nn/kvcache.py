"""A KV cache that holds codes, as transformers' attention asks for one, and what caches take in memory.

Attention sees every token as the cache holds it after the tokens of the same call were added: a pass over a whole
window attends to codes throughout, also within groups that a decoder would still have held as floats when it was
at that token. Figures of such a pass are therefore no better than decoding's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from harness.core import KVFormat
from harness.core.formats import States

MakeCache = Callable[[], Any]
LENGTHS = (2048, 8192, 32768)
BATCHES = (1, 8, 32)
_MIB = 2**20


class CodedLayer(CacheLayerMixin):
    """Keys and values of one layer. It only grows: sliding windows are masked, not dropped."""

    is_sliding = False

    def __init__(self, fmt: KVFormat) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stored = States(fmt.key, fmt.residual), States(fmt.value, fmt.residual)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Add the tokens of one call, (B, heads, T, head_dim); returns all so far as they are stored."""
        self.lazy_initialization(key_states, value_states)
        keys, values = self.stored
        return keys.append(key_states), values.append(value_states)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [tensor for states in self.stored for tensor in states.tensors]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return len(self.stored[0])

    def get_max_length(self) -> int:
        return -1


def maker(fmt: KVFormat | None) -> MakeCache | None:
    """What makes an empty cache of the format; None for float caches, which models make themselves."""
    return None if fmt is None else lambda: _coded(fmt)


def _coded(fmt: KVFormat) -> Any:
    return Cache(layer_class_to_replicate=lambda: CodedLayer(fmt))  # type: ignore[arg-type]


def held_bytes(cache: Any) -> int | None:
    """Bytes of memory that a cache, float or coded, holds; None if layers hold something else than keys and values."""
    if _others(cache):
        return None
    layers = (x.tensors if isinstance(x, CodedLayer) else [x.keys, x.values] for x in cache.layers)
    return sum(tensor.untyped_storage().nbytes() for tensors in layers for tensor in tensors)


def check(fmt: KVFormat, shape: Any, seq_len: int, name: str) -> str | None:
    """Check a format against the model's config, before its weights are there; returns a warning where due.

    Raises: ValueError if layers cache something else than keys and values, or no token of a window would be coded.
    """
    other = _others(DynamicCache(config=shape))
    if other:
        raise ValueError(
            f"kv={fmt.name} cannot hold the {type(other[0]).__name__} of model={name}; expected layers that cache "
            "keys and values alone, use kv=none"
        )
    if fmt.residual + fmt.tokens > seq_len:
        raise ValueError(
            f"kv.residual={fmt.residual} and groups of {fmt.tokens} tokens leave all of data.seq_len={seq_len} float; "
            "use a longer seq_len, or fewer"
        )
    window = _window(shape)
    if window is not None and seq_len > window:
        return f"kv={fmt.name} holds all {seq_len} tokens of layers that see {window}; kv_mib is larger than need be"
    return None


def _others(cache: Any) -> list[Any]:
    """Layers of a cache that hold something else than keys and values."""
    known = (DynamicLayer, DynamicSlidingWindowLayer, CodedLayer)
    return [layer for layer in cache.layers if type(layer) not in known]


def _window(shape: Any) -> int | None:
    """Tokens that the layer with the shortest sliding window sees, if there is one."""
    layers = DynamicCache(config=shape).layers
    return min((x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)), default=None)


@torch.inference_mode()
def prove(model: nn.Module, fmt: KVFormat) -> None:
    """Run the model on two tokens with a coded cache.

    Raises: ValueError if the format does not fit its heads, or the model leaves the cache empty.
    """
    cache = _coded(fmt)
    _filled(model, 2, lambda: cache)
    if not (cache.layers and all(layer.get_seq_length() == 2 for layer in cache.layers)):
        raise ValueError(f"kv={fmt.name}: {type(model).__name__} does not use the cache it is given; use kv=none")


@torch.inference_mode()
def footprint(model: nn.Module, fmt: KVFormat | None) -> tuple[float | None, list[dict[str, float]]]:
    """Bytes that a token adds to the cache of one sequence, and MiB by length and batch, as far as positions reach.

    Short caches are built and measured. Past the first `residual` tokens, bytes grow by the same amount every
    `tokens` tokens, and always in proportion to the batch, so that these figures are exact.
    """
    shape: Any = model.config
    window, longest = _window(shape), getattr(shape.get_text_config(), "max_position_embeddings", None)
    limit = min(window - 1 if window else 2**63, longest or 2**63)
    residual, period = (fmt.residual, fmt.tokens) if fmt else (0, 1)
    start = max(residual, period)
    if start + period > limit or _others(DynamicCache(config=shape)):
        return None, []

    def measured(length: int) -> int:
        held = held_bytes(_filled(model, length, maker(fmt)))
        assert held is not None  # as the config says
        return held

    first, second = measured(start), measured(start + period)
    slope = (second - first) / period
    rows = []
    for length in (n for n in LENGTHS if n <= limit):
        short = start + (length - start) % period
        one = (first if short == start else measured(short)) + slope * (length - short)
        rows += [{"batch": batch, "length": length, "mib": one * batch / _MIB} for batch in BATCHES]
    return slope, rows


def _filled(model: Any, length: int, cache: MakeCache | None) -> Any:
    """The cache after one sequence of `length` tokens."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = (torch.arange(length, device=next(model.parameters()).device) % vocabulary)[None]
    options = {"past_key_values": cache()} if cache else {}
    return model.base_model(input_ids=tokens, use_cache=True, **options).past_key_values
