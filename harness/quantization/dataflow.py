"""Data flow through a model: observes every torch function of one forward and identifies tensors by object identity.

Sums of the outputs of embeddings and linears are followed through additions, dropout, views and factors, into norms
and linears. Any other operation on such a sum, or on the output of a norm, is recorded as a use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.models import Decoder
from harness.nn import hooked, tensors_of

_ADD = frozenset({"add", "iadd", "radd"})
_SCALE = frozenset({"mul", "imul", "rmul", "div", "truediv", "true_divide"})
_KEEP = frozenset({"dropout", "view", "reshape", "getitem", "contiguous", "clone", "to", "type", "float", "double"}) | {
    "type_as", "detach", "requires_grad", "squeeze", "unsqueeze", "flatten", "view_as", "reshape_as"
}  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """A sum of outputs of embeddings and linears; `makers` are their names."""

    makers: frozenset[str]


@dataclass(frozen=True)
class Normed:
    """The output of a norm for the sum `of`."""

    norm: str
    of: Sum


@dataclass(frozen=True)
class Use:
    """Another operation on a value: rotating the value would change the result.

    what   name of the torch function, or kind of operation
    where  name of the module that ran it; empty for the model itself
    """

    value: Sum | Normed
    what: str
    where: str


class Flow(TorchFunctionMode):
    """Follows values through one forward. A norm, a linear or an embedding is a single step.

    inputs  norm -> the sums that it read
    normed  linear -> the norms whose output it read
    bare    linear -> the sums that it read without a norm
    lone    embedding -> the norm of this embedding alone, whose output is added to the stream
    uses    all other operations on followed values
    ran     the norms, linears and embeddings that ran
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model = model = decoder.model
        self.linears = {name: module for name, module in model.named_modules() if decoder.is_linear(module)}
        self.tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        self.norms = {name: module for name, module in model.named_modules() if _has_gain(module)}
        self.inputs: dict[str, set[Sum]] = {}
        self.normed: dict[str, set[str]] = {}
        self.bare: dict[str, set[Sum]] = {}
        self.lone: dict[str, str] = {}
        self.uses: list[Use] = []
        self.ran: set[str] = set()
        self._values: dict[int, tuple[Tensor, Sum | Normed]] = {}  # holds the tensor, so that no other gets its id
        self._running: list[str] = []  # names of the modules whose forward is running, outermost first
        self._open_steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the forward that runs inside."""
        single = self.linears.keys() | self.tables.keys() | self.norms.keys()
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name, name in single), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name, name in single), with_kwargs=True))
        with hooked(handles), self:
            yield
        self._values.clear()

    def _enter(self, name: str, single: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _options: Any) -> None:
            self._running.append(name)
            self._open_steps += single

        return hook

    def _leave(self, name: str, single: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, options: Any, output: Any) -> None:
            self._running.pop()
            self._open_steps -= single
            if single and not self._open_steps:
                self._step(name, next(tensors_of((args, options)), None), output)

        return hook

    def _step(self, name: str, inputs: Tensor | None, output: Tensor) -> None:
        """Record the input and the output of a norm, a linear or an embedding."""
        self.ran.add(name)
        value = self._value(inputs)
        if name in self.norms:
            summed = self._as_sum(value, "a norm") if isinstance(value, Normed) else value
            if summed is not None:
                self.inputs.setdefault(name, set()).add(summed)
                self._note(output, Normed(name, summed))
            return
        if name in self.linears and isinstance(value, Normed):
            self.normed.setdefault(name, set()).add(value.norm)
        elif name in self.linears and isinstance(value, Sum):
            self.bare.setdefault(name, set()).add(value)
        self._note(output, Sum(frozenset({name})))

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._open_steps:
            name = getattr(func, "__name__", str(func)).strip("_")
            self._function(name, list(tensors_of((args, kwargs or {}))), list(tensors_of(result)))
        return result

    def _function(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Record the outputs of a torch function outside all steps, or its inputs as used."""
        values = [value for value in map(self._value, inputs) if value is not None]
        if not values or not outputs or name.startswith("new_") or name.endswith("_like"):
            return
        same_width = len(outputs) == 1 and outputs[0].shape[-1:] == inputs[0].shape[-1:]
        from_first = same_width and self._value(inputs[0]) is not None
        if name in _ADD and len(inputs) == 2:
            self._note(outputs[0], self._added(inputs))
        elif from_first and (name in _KEEP or (name in _SCALE and all(factor.dim() == 0 for factor in inputs[1:]))):
            self._note(outputs[0], values[0])
        else:
            self.uses += [Use(value, name, self._running[-1]) for value in values]

    def _added(self, inputs: list[Tensor]) -> Sum:
        values = [self._value(tensor) for tensor in inputs]
        sums = [self._as_sum(value, "add") if isinstance(value, Normed) else value for value in values]
        if None in values:
            followed = next(value for value in sums if value is not None)
            self.uses.append(Use(followed, "add of a tensor from no linear or embedding", self._running[-1]))
        return Sum(frozenset().union(*(value.makers for value in sums if value is not None)))

    def _as_sum(self, value: Normed, reader: str) -> Sum:
        """The sum under a norm whose output `reader` reads; a use, unless it is the norm of a single embedding."""
        makers = value.of.makers
        if len(makers) == 1 and makers <= self.tables.keys():
            self.lone[next(iter(makers))] = value.norm
        else:
            self.uses.append(Use(value, reader, self._running[-1]))
        return value.of

    def _value(self, tensor: Tensor | None) -> Sum | Normed | None:
        entry = self._values.get(id(tensor))
        return None if entry is None else entry[1]

    def _note(self, tensor: Tensor, value: Sum | Normed) -> None:
        self._values[id(tensor)] = (tensor, value)


def _has_gain(module: nn.Module) -> bool:
    """Whether a module has one gain per channel; its function is measured elsewhere."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1
