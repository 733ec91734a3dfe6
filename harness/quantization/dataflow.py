"""How values flow through a model: every torch function of one forward is followed, by the identity of tensors.

Followed are sums of what embeddings and linears give: through additions, dropout, views and factors, into norms and
linears. All else that is done with such a sum, or with a norm's output, is noted as a use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.models import linears_of
from harness.nn import hooked, tensors_of

_ADD = frozenset({"add", "iadd", "radd"})
_SCALE = frozenset({"mul", "imul", "rmul", "div", "truediv", "true_divide"})
_KEEP = frozenset({"dropout", "view", "reshape", "getitem", "contiguous", "clone", "to", "type", "float", "double"}) | {
    "type_as", "detach", "requires_grad", "squeeze", "unsqueeze", "flatten", "view_as", "reshape_as"
}  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """A sum of outputs of embeddings and linears, by their names."""

    makers: frozenset[str]


@dataclass(frozen=True)
class Normed:
    """A norm's output, of a sum."""

    norm: str
    of: Sum


@dataclass(frozen=True)
class Use:
    """What a function in module `where` did with a value, which a turned one would not survive."""

    value: Sum | Normed
    what: str
    where: str


class Flow(TorchFunctionMode):
    """Follows values through one forward. Norms, linears and embeddings are single steps.

    inputs  of each norm, the sums that it read
    normed  of each linear, the norms whose output it read; bare: the sums that it read without a norm
    lone    embeddings with a norm of their own, whose output is what is added to the stream
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.linears = linears_of(model)
        self.tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        self.norms = {name: module for name, module in model.named_modules() if _has_gain(module)}
        self.inputs: dict[str, set[Sum]] = {}
        self.normed: dict[str, set[str]] = {}
        self.bare: dict[str, set[Sum]] = {}
        self.lone: dict[str, str] = {}
        self.uses: list[Use] = []
        self.ran: set[str] = set()
        self._known: dict[int, tuple[Tensor, Sum | Normed]] = {}  # holds the tensor, so that its id stays its own
        self._inside: list[str] = []
        self._steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        single = self.linears.keys() | self.tables.keys() | self.norms.keys()
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name, name in single), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name, name in single), with_kwargs=True))
        with hooked(handles), self:
            yield
        self._known.clear()

    def _enter(self, name: str, single: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _options: Any) -> None:
            self._inside.append(name)
            self._steps += single

        return hook

    def _leave(self, name: str, single: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, options: Any, output: Any) -> None:
            self._inside.pop()
            self._steps -= single
            if single and not self._steps:
                self._step(name, next(tensors_of((args, options)), None), output)

        return hook

    def _step(self, name: str, given: Tensor | None, output: Tensor) -> None:
        """Note what a norm, a linear or an embedding read and made."""
        self.ran.add(name)
        value = self._value(given)
        if name in self.norms:
            read = self._as_sum(value, "a norm") if isinstance(value, Normed) else value
            if read is not None:
                self.inputs.setdefault(name, set()).add(read)
                self._note(output, Normed(name, read))
            return
        if name in self.linears and isinstance(value, Normed):
            self.normed.setdefault(name, set()).add(value.norm)
        elif name in self.linears and isinstance(value, Sum):
            self.bare.setdefault(name, set()).add(value)
        self._note(output, Sum(frozenset({name})))

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self._steps:
            name = getattr(func, "__name__", str(func)).strip("_")
            self._function(name, list(tensors_of((args, kwargs or {}))), list(tensors_of(found)))
        return found

    def _function(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        values = [value for value in map(self._value, given) if value is not None]
        if not values or not made or name.startswith("new_") or name.endswith("_like"):
            return
        kept = len(made) == 1 and made[0].shape[-1:] == given[0].shape[-1:] and self._value(given[0]) is not None
        if name in _ADD and len(given) == 2:
            self._note(made[0], self._added(given))
        elif kept and (name in _KEEP or (name in _SCALE and all(other.dim() == 0 for other in given[1:]))):
            self._note(made[0], values[0])
        else:
            self.uses += [Use(value, name, self._inside[-1]) for value in values]

    def _added(self, given: list[Tensor]) -> Sum:
        values = [self._value(tensor) for tensor in given]
        sums = [self._as_sum(value, "add") if isinstance(value, Normed) else value for value in values]
        if None in values:
            known = next(value for value in sums if value is not None)
            self.uses.append(Use(known, "add of what no linear makes", self._inside[-1]))
        return Sum(frozenset().union(*(value.makers for value in sums if value is not None)))

    def _as_sum(self, value: Normed, reader: str) -> Sum:
        """A norm's output that is no linear's alone: an embedding with a norm of its own, or an obstacle."""
        makers = value.of.makers
        if len(makers) == 1 and makers <= self.tables.keys():
            self.lone[next(iter(makers))] = value.norm
        else:
            self.uses.append(Use(value, reader, self._inside[-1]))
        return value.of

    def _value(self, tensor: Tensor | None) -> Sum | Normed | None:
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def _note(self, tensor: Tensor, value: Sum | Normed) -> None:
        self._known[id(tensor)] = (tensor, value)


def _has_gain(module: nn.Module) -> bool:
    """A module with a gain a channel; what it really does is measured."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1
