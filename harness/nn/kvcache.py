"""A KV cache that stores codes, with the interface that transformers' attention expects, and the memory of caches.

Attention sees every token as the cache stores it after all tokens of the same call were added. A pass over a whole
window therefore attends to codes throughout, also within groups that a decoder at that token would still store as
floats. So its perplexity and KL are no better than those of decoding token by token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from harness.core import KVFormat
from harness.core.formats import States
from harness.nn.calls import accepted, cache_of, one_line_errors
from harness.nn.positions import positions

MakeCache = Callable[[], Any]
LENGTHS = (2048, 8192, 32768)
BATCHES = (1, 8, 32)
_MIB = 2**20


class CodedLayer(CacheLayerMixin):
    """Keys and values of one layer as codes. It only grows: tokens outside a sliding window are masked, not dropped."""

    is_sliding = False

    def __init__(self, fmt: KVFormat) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stored = States(fmt.key, fmt.residual), States(fmt.value, fmt.residual)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of one call, (B, heads, T, head_dim); returns those of all tokens so far, decoded."""
        self.lazy_initialization(key_states, value_states)
        keys, values = self.stored
        return keys.append(key_states), values.append(value_states)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that the layer stores."""
        return [tensor for states in self.stored for tensor in states.tensors]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return len(self.stored[0])

    def get_max_length(self) -> int:
        return -1


class FixedLayer(StaticLayer):
    """Float keys and values of one layer, in memory for `length` tokens that is allocated once and stays in place.

    New tokens go to the positions from `start` (a scalar int64 tensor that all layers share) on. The caller sets it
    before each forward, so that the forward of every position is the same sequence of operations on the same memory.
    Tokens after the new ones are masked, and so are those outside a sliding window.
    """

    def __init__(self, length: int, start: Tensor) -> None:
        super().__init__(max_cache_len=length)
        self.cumulative_length = start

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of one call, (B, heads, T, head_dim); returns the whole memory, `length` tokens."""
        assert self.keys is not None
        assert self.values is not None
        places = torch.arange(key_states.shape[2], device=key_states.device) + self.cumulative_length
        return self.keys.index_copy_(2, places, key_states), self.values.index_copy_(2, places, value_states)


def fixed(model: nn.Module, cache: Any, length: int, start: Tensor) -> Any:
    """An empty cache for `length` tokens, with layers as those of `cache`, which the model has returned and filled.

    The next forward puts its tokens at the positions from `start` (a scalar int64 tensor) on.
    Raises: ValueError if the model returns no cache, or its layers store anything but keys and values.
    """
    layers = []
    for filled in _checked(model, cache).layers:
        layers.append(FixedLayer(length, start))
        layers[-1].lazy_initialization(filled.keys, filled.values)
    return Cache(layers=[*layers])


def maker(fmt: KVFormat | None) -> MakeCache | None:
    """A function that makes an empty cache of the format; None for float caches, which models make themselves."""
    return None if fmt is None else lambda: _coded(fmt)


def _coded(fmt: KVFormat) -> Any:
    layers = itertools.count()
    return Cache(layer_class_to_replicate=lambda: CodedLayer(fmt.of_layer(next(layers))))  # type: ignore[arg-type]


def held_bytes(cache: Any) -> int | None:
    """Bytes of memory that a cache, float or coded, takes; None if a layer stores anything but keys and values."""
    if _others(cache):
        return None
    layers = (x.tensors if isinstance(x, CodedLayer) else [x.keys, x.values] for x in cache.layers)
    return sum(tensor.untyped_storage().nbytes() for tensors in layers for tensor in tensors)


def check(fmt: KVFormat, shape: Any, seq_len: int, name: str) -> str | None:
    """Check a format against the model's config, before the weights are loaded; returns a warning or None.

    Raises: ValueError if a layer caches anything but keys and values, or no token of a window would be coded.
    """
    unsupported = _others(_made_for(shape))
    if unsupported:
        raise ValueError(
            f"kv={fmt.name} cannot replace the {type(unsupported[0]).__name__} of model={name}; expected layers that "
            "cache only keys and values, use kv=none"
        )
    if fmt.residual + fmt.tokens > seq_len:
        raise ValueError(
            f"kv.residual={fmt.residual} and groups of {fmt.tokens} tokens leave all tokens of data.seq_len={seq_len} "
            "float; use a longer data.seq_len, a smaller kv.residual or smaller groups"
        )
    window = _window(shape)
    if window is not None and seq_len > window:
        return (
            f"kv={fmt.name} stores all {seq_len} tokens in layers that attend to the last {window}; "
            "kv_mib is larger than necessary"
        )
    return None


def _others(cache: Any) -> list[Any]:
    """Layers of a cache that store anything but keys and values; the cache itself if its class has no layers."""
    supported = (DynamicLayer, DynamicSlidingWindowLayer, CodedLayer, FixedLayer)
    return [layer for layer in getattr(cache, "layers", [cache]) if type(layer) not in supported]


def _made_for(shape: Any) -> Any:
    """The float cache that transformers makes for a config; one without layers if the config describes none."""
    try:
        return DynamicCache(config=shape)
    except (AttributeError, KeyError, TypeError, ValueError):
        return DynamicCache()


def _window(shape: Any) -> int | None:
    """Length of the shortest sliding window of a layer, in tokens; None if no layer has one."""
    layers = _made_for(shape).layers
    return min((x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)), default=None)


@torch.inference_mode()
def prove(model: nn.Module, fmt: KVFormat) -> None:
    """Run the model on two tokens with a coded cache, to prove that it uses the cache.

    Raises: ValueError if the format does not fit the attention heads, or the model leaves the cache empty.
    """
    cache = _coded(fmt)
    with one_line_errors(model, f"kv={fmt.name}", "use kv=none"):
        _filled(model, 2, lambda: cache)
    if not (cache.layers and all(layer.get_seq_length() == 2 for layer in cache.layers)):
        raise ValueError(
            f"kv={fmt.name}: {type(model).__name__} does not use the cache that is passed to it; use kv=none"
        )


@torch.inference_mode()
def footprint(model: nn.Module, fmt: KVFormat | None) -> tuple[float, list[dict[str, float]]]:
    """Bytes that one token adds to the cache of one sequence, and rows of MiB for each length and batch size.

    Short caches are built and measured. Past the first `residual` tokens, the bytes grow by the same amount every
    `tokens` tokens, and always in proportion to the batch, so the figures are exact. Lengths that exceed the model's
    positions or its sliding window are left out.

    Raises: ValueError if the model returns no cache, its layers cache anything but keys and values, or its window or
    positions are too short.
    """
    shape: Any = model.config
    window, longest = _window(shape), positions(shape, model)
    limit = min(window - 1 if window else 2**63, longest or 2**63)
    residual, period = (fmt.residual, fmt.tokens) if fmt else (0, 1)
    start = max(residual, period)
    if start + period > limit:
        raise ValueError(f"{start + period} tokens exceed the model's window or positions")

    def measure(length: int) -> int:
        size = held_bytes(_checked(model, _filled(model, length, maker(fmt))))
        assert size is not None  # checked above: all layers cache keys and values
        return size

    first, second = measure(start), measure(start + period)
    slope = (second - first) / period
    rows = []
    for length in (n for n in LENGTHS if n <= limit):
        short = start + (length - start) % period
        sequence_bytes = (first if short == start else measure(short)) + slope * (length - short)
        rows += [{"batch": batch, "length": length, "mib": sequence_bytes * batch / _MIB} for batch in BATCHES]
    return slope, rows


def _checked(model: nn.Module, cache: Any) -> Any:
    """`cache`, which the model has returned.

    Raises: ValueError if it is no cache, or its layers store anything but keys and values.
    """
    if cache is None:
        raise ValueError(f"{type(model).__name__} returns no past_key_values")
    others = _others(cache)
    if others:
        raise ValueError(f"{type(model).__name__} caches more than keys and values ({type(others[0]).__name__})")
    return cache


def _filled(model: Any, length: int, cache: MakeCache | None) -> Any:
    """The cache after one sequence of `length` tokens; None if the model returns none."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    tokens = (torch.arange(length, device=next(model.parameters()).device) % vocabulary)[None]
    options = {"past_key_values": cache()} if cache else {}
    return cache_of(model.base_model(input_ids=tokens, **accepted(model.base_model, use_cache=True, **options)))
