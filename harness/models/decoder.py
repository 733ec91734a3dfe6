"""The decoder of a model: its blocks and the linears inside them, proved by one forward on a few tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.models.architecture import is_linear
from harness.models.probe import NOT_RUN, Probe
from harness.utils.names import kind_of


class Decoder:
    """The decoder blocks of `model`, discovered once.

    A block is an item of a module list that runs in a forward on tokens and returns states of the shape of its input.
    Lists inside an item are part of the block. Items may have several classes, and there may be several lists.

    names    full names of the blocks
    blocks   the blocks in the order in which they first run; modules inside them can be replaced later, and `linears`
             returns the current ones
    probed   whether a forward showed them; else the model is a skeleton that cannot run, and all lists that may be
             blocks and all linears in them count
    calls    how often each block was called in that forward
    missing  why there is no block; empty if there are some

    A model without blocks is accepted, because the float baseline needs none; `require` refuses it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.missing = ""
        probe = None
        try:
            probe = Probe(model)
        except Exception as error:  # the model's own code fails: on the meta device, or because it needs other inputs
            if not _is_skeleton(model):
                reason = " ".join(str(error).split())[:80]
                self.missing = f"cannot run on token ids alone ({type(error).__name__}: {reason})"
        self.probed = probe is not None
        stacks = [] if self.missing else list(_stacks(model, "", probe))
        items = [(f"{name}.{i}", item) for name, stack in stacks for i, item in stack.named_children()]
        if probe is not None:
            items = _in_order(items, probe)
        self.names = [name for name, _ in items]
        self.blocks: list[nn.Module] = [block for _, block in items]
        self._calls = Counter[nn.Module]() if probe is None else probe.calls
        self.calls = [self._calls[block] if probe else 1 for block in self.blocks]
        if not items and not self.missing:
            self.missing = "has no list of decoder blocks that runs on tokens"
        named = {name: module for name, module in model.named_modules() if is_linear(module)}
        self._reasons: dict[nn.Module, str] = {} if probe is None else _reasons(named, probe)
        self._linears = {module for module in named.values() if module not in self._reasons}

    def name(self, index: int) -> str:
        """Full name of block number `index`."""
        return self.names[index]

    def require(self) -> None:
        """Raises: ValueError if the model has no decoder blocks."""
        if self.missing:
            raise ValueError(f"model of class {type(self.model).__name__} {self.missing}; use method=none")

    def is_linear(self, module: nn.Module) -> bool:
        """Whether a module of the model is a linear that was proved; also for linears outside the blocks."""
        return module in self._linears

    def count(self, module: nn.Module) -> int:
        """How often a module was called in the forward that showed the blocks; at least 1."""
        return self._calls[module] or 1

    def linears(self, index: int | None = None) -> dict[str, nn.Module]:
        """The linears of one block, or of all blocks, by full name in module order; without embedding and head.

        A linear that several blocks contain has the name that it has in the first of them.
        """
        linears: dict[nn.Module, str] = {}
        for i in range(len(self.blocks)) if index is None else [index]:
            for name, module in self.blocks[i].named_modules(prefix=self.names[i]):
                if module in self._linears:
                    linears.setdefault(module, name)
        return {name: module for module, name in linears.items()}

    def uncovered(self) -> dict[str, str]:
        """Matrices in the blocks that no method quantizes, and why.

        Returns: name of the linear or parameter -> reason. Parameters are those of no linear, such as fused experts.
        """
        reasons: dict[str, str] = {}
        ids: set[int] = set()
        for prefix, block in zip(self.names, self.blocks, strict=True):
            for name, module in block.named_modules(prefix=prefix):
                for key, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() < 2 or module in self._linears or id(parameter) in ids:
                        continue
                    ids.add(id(parameter))
                    reason = self._reasons.get(module)
                    reasons |= {name: reason} if reason else {f"{name}.{key}": "it belongs to no linear"}
        return reasons

    def notes(self) -> list[str]:
        """One warning for each kind of matrix that stays float, with `*` for the numbers of blocks and experts."""
        kinds: dict[tuple[str, str], list[str]] = {}
        for name, reason in self.uncovered().items():
            kinds.setdefault((kind_of(name), reason), []).append(name)
        return [
            f"{names[0] if len(names) == 1 else kind} stays float: {reason}" for (kind, reason), names in kinds.items()
        ]


def _is_skeleton(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _stacks(module: nn.Module, prefix: str, probe: Probe | None) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost module lists of decoder blocks, by full name."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and any(_is_block(item, probe) for item in child):
            yield prefix + name, child
        else:
            yield from _stacks(child, f"{prefix}{name}.", probe)


def _is_block(item: nn.Module, probe: Probe | None) -> bool:
    """Whether an item of a module list is a decoder block.

    A container that is not called itself, but whose modules run, counts too; a list inside a list does not.
    """
    if isinstance(item, nn.ModuleList) or not any(True for _ in item.children()):
        return False
    if probe is None:
        return any(is_linear(module) for module in item.modules())
    return item in probe.carries or (item not in probe.order and any(part in probe.order for part in item.modules()))


def _in_order(items: list[tuple[str, nn.Module]], probe: Probe) -> list[tuple[str, nn.Module]]:
    """The items in the order in which they first run; one that does not run stays behind the item before it."""
    firsts: list[int] = []
    for _, item in items:
        runs = [probe.order[part] for part in item.modules() if part in probe.order]
        earliest = min(runs) if runs else firsts[-1] if firsts else 0
        firsts.append(probe.order.get(item, earliest))
    return [item for _, item in sorted(zip(firsts, items, strict=True), key=lambda pair: pair[0])]


def _reasons(named: dict[str, nn.Module], probe: Probe) -> dict[nn.Module, str]:
    """The modules among `named` that are no linears, and why.

    A linear that did not run, such as an expert that received no token, counts if its class is `nn.Linear` or `Conv1D`
    itself and its siblings of the same name that ran are linears.
    """
    kinds: dict[str, set[bool]] = {}
    for name, module in named.items():
        if module in probe.linears or module in probe.reasons:
            kinds.setdefault(kind_of(name), set()).add(module in probe.linears)
    reasons = dict(probe.reasons)
    for name, module in named.items():
        plain = type(module) in (nn.Linear, Conv1D) and kinds.get(kind_of(name)) == {True}
        if module not in probe.linears and not plain:
            reasons.setdefault(module, NOT_RUN)
    return reasons
