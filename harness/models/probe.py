"""One forward on a few tokens that shows which modules run, in which order, and which of them are linears.

A module counts as a linear only if it was seen to compute x W^T + b: routers that are subclasses of `nn.Linear` may
return tuples, and some models read `linear.weight` and never call the linear. Neither can be replaced by a QuantLinear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from harness.models.architecture import is_linear, weight_of
from harness.nn import accepted, hooked, positions, tensors_of

_TOKENS = 32  # enough to reach most experts of a small mixture, and cheap
_ROWS = 4  # tokens on which the output of a linear is compared
# Relative error of a linear's output to x W^T + b that rounding explains.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_READS_VALUES = frozenset({"__set__", "item", "tolist", "numpy"})  # functions that return no tensor, but use values

NOT_CALLED_AS_LINEAR = "calling it does not compute x W^T + b"
READ_OUTSIDE = "its weight is read while the module does not run"
NOT_RUN = "it did not run on the probe tokens"


class Probe(TorchFunctionMode):
    """Watches the modules of a model during one forward.

    order    module -> number of its first call
    calls    module -> how often it was called
    carries  modules that returned a tensor of the shape of one of their inputs, as blocks do with hidden states
    linears  linears that computed x W^T + b at each call; on the meta device, that returned a tensor of its shape
    reasons  other linears that ran or whose weight was read -> why they are no linears
    """

    def __init__(self, model: nn.Module) -> None:
        """Run `model` on a few tokens.

        Raises: Exception of any class, if the model cannot run on token ids alone, or not on the meta device.
        """
        super().__init__()
        self.order: dict[nn.Module, int] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.carries: set[nn.Module] = set()
        self.linears: set[nn.Module] = set()
        self.reasons: dict[nn.Module, str] = {}
        self._running: Counter[nn.Module] = Counter()
        self._owners: dict[int, list[nn.Module]] = {}  # of each weight of a linear, by its id
        tied = {id(module.weight) for module in model.modules() if is_linear(module)}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) in tied:
                    self._owners.setdefault(id(parameter), []).append(module)
        with hooked(self._handles(model)), self:
            logits(model, probe_tokens(model))
        self.linears -= self.reasons.keys()

    def _handles(self, model: nn.Module) -> Iterator[Any]:
        for module in model.modules():
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield module.register_forward_hook(self._leave, with_kwargs=True)

    def _enter(self, module: nn.Module, _args: Any, _options: Any) -> None:
        self.order.setdefault(module, len(self.order))
        self.calls[module] += 1
        self._running[module] += 1

    def _leave(self, module: nn.Module, args: Any, options: Any, output: Any) -> None:
        inputs = {tensor.shape for tensor in tensors_of((args, options)) if tensor.is_floating_point()}
        if any(tensor.dim() > 1 and tensor.shape in inputs for tensor in tensors_of(output)):
            self.carries.add(module)
        if is_linear(module) and all(tensor.numel() for tensor in tensors_of((args, options))):
            if _computes_linear(module, args, options, output):
                self.linears.add(module)
            else:
                self.reasons[module] = NOT_CALLED_AS_LINEAR
        self._running[module] -= 1

    def __torch_function__(self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and args[0].is_meta:
            # It has no value; models ask whether tokens are consecutive and unpadded, as those of the probe are.
            return True
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of((args, kwargs or {})):
            owners = self._owners.get(id(tensor), ())
            if owners and not any(self._running[owner] for owner in owners) and _uses_values(func, result):
                self.reasons |= {owner: READ_OUTSIDE for owner in owners if is_linear(owner)}
        return result


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's logits (B, T, V) on `tokens` (B, T)."""
    return forward(model, tokens)


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Like `logits`, but not under `no_grad`: the caller decides about gradients."""
    on_device = tokens.to(next(model.parameters()).device)
    output: Tensor = model(input_ids=on_device, **accepted(model, use_cache=False)).logits
    return output


def probe_tokens(model: nn.Module) -> Tensor:
    """Token ids (1, T), spread over the vocabulary, without the ids that the config names (padding, images)."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    count = getattr(text, "vocab_size", None)
    if not isinstance(count, int):
        count = next(module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
    named = {**config.to_dict(), **text.to_dict()} if config is not None and text is not None else {}
    special = {id_ for key, value in named.items() if key.endswith("_token_id") for id_ in _integers(value)}
    ids = [id_ for id_ in range(count) if id_ not in special] or [0]
    limit = None if config is None else positions(config, model)
    length = min(_TOKENS, len(ids), limit or _TOKENS)
    return torch.tensor([[ids[i * len(ids) // length] for i in range(length)]])


def _integers(value: Any) -> list[int]:
    return [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, int)]


def _uses_values(func: Callable[..., Any], result: Any) -> bool:
    """Whether a torch function used more of a tensor than its shape, dtype and device."""
    return any(True for _ in tensors_of(result)) or getattr(func, "__name__", "") in _READS_VALUES


def _computes_linear(module: nn.Module, args: Any, options: Any, output: Any) -> bool:
    """Whether a call of `module` with one tensor x (..., K) returned x W^T + b (..., N), compared on a few tokens."""
    weight = module._parameters.get("weight")
    if options or len(args) != 1 or not isinstance(args[0], Tensor) or weight is None or weight.dim() != 2:
        return False
    inputs, (rows, columns) = args[0], weight_of(module).shape
    if not isinstance(output, Tensor) or inputs.shape[-1] != columns or output.shape != (*inputs.shape[:-1], rows):
        return False
    if inputs.is_meta:
        return True
    if inputs.dtype != weight.dtype or output.dtype != weight.dtype:
        return False
    tokens = slice(None, None, max(1, inputs.numel() // columns // _ROWS))
    bias = module._parameters.get("bias")
    expected = F.linear(inputs.reshape(-1, columns)[tokens], weight_of(module), bias).double()
    actual = output.reshape(-1, rows)[tokens].double()
    if not torch.isfinite(expected).all():  # a weight overflows: no call can be compared, and scoring will refuse it
        return type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return bool((actual - expected).norm() <= _ROUNDING.get(weight.dtype, 1e-4) * expected.norm())
