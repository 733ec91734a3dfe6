"""Calibration activations, one decoder block at a time: captured before the first, moved through the next by replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration.proofs import SAME_LOGITS, relative_error, within
from harness.calibration.shortcut import Shortcut
from harness.models import Decoder
from harness.nn.hooks import first_of, hooked

Watcher = Callable[[Tensor], None]


class _Enough(Exception):  # noqa: N818 - it is no error: every watched linear has been seen
    """Ends a block's forward."""


class Stream:
    """The inputs of one decoder block for every sequence, and whatever else the model hands to its blocks.

    Holds the hidden states (1, T, D) of all sequences at one block, nothing of other blocks. `advance` only notes that
    the blocks so far are final; the states catch up when somebody asks for them.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """Run the model on `tokens` (B, T) int64 up to its first block, one sequence at a time.

        Raises: ValueError if the blocks are called in a way that cannot be replayed.
        """
        model, self.blocks = decoder.model, decoder.blocks
        self.position = 0
        self.calls = _calls(partial(logits, model, tokens[:1]), self.blocks, _without_states)
        if len(self.calls) != len(self.blocks):
            raise ValueError(
                f"{type(model).__name__} calls {len(self.calls)} of its {len(self.blocks)} blocks; expected each once"
            )
        self._states: list[Tensor] = []
        self._reached = 0
        self.shortcuts: Sequence[Shortcut] = ()  # of the block at `position`
        for sequence in tokens:
            ((states, rest),) = _calls(partial(logits, model, sequence[None]), self.blocks[:1], _split_call)
            if not _equal(rest, self.calls[0]):
                raise ValueError(
                    f"{type(model).__name__} hands its blocks inputs that depend on the tokens, beside the hidden "
                    "states; such a model cannot be calibrated block by block, use a data-free method such as rtn"
                )
            self._states.append(states)

    @torch.no_grad()
    def run(self, states: Tensor, block: nn.Module | None = None) -> Tensor:
        """Output states of the block at `position` (or a copy of it) for input states (1, T, D)."""
        return self._run(self.position, states, block)

    def run_to_train(self, states: Tensor) -> Tensor:
        """As `run`, with gradients where the caller asks for them."""
        return self._run(self.position, states)

    def _run(self, position: int, states: Tensor, block: nn.Module | None = None) -> Tensor:
        args, options = self.calls[position]
        args, options = _cast(args, states.dtype), _cast(options, states.dtype)
        found: Tensor = first_of((block or self.blocks[position])(states, *args, **options))
        return found

    @torch.no_grad()
    def onward(self, states: Tensor) -> Tensor:
        """What the last block gives, for input states (1, T, D) of the block at `position`."""
        for position in range(self.position, len(self.blocks)):
            states = self._run(position, states)
        return states

    @property
    def states(self) -> list[Tensor]:
        """Hidden states (1, T, D) that enter the block at `position`."""
        self.catch_up()
        return self._states

    @torch.no_grad()
    def catch_up(self) -> None:
        """Run the blocks that were advanced past, as they are now."""
        while self._reached < self.position:
            outputs = []
            for i, states in enumerate(self._states):
                with self._shortened(i):
                    outputs.append(self._run(self._reached, states))
            self._states = outputs
            self._reached += 1
            self.shortcuts = ()

    def outputs(self, watchers: Mapping[nn.Module, Watcher], keep: bool) -> list[Tensor]:
        """Show the watched linears' inputs to their watchers, sequence by sequence; `keep` returns the outputs.

        Without `keep` a forward ends once every watcher has seen its input.
        """
        found = []
        seen = [cut for cut in self.shortcuts if cut.linear in watchers and not cut.inputs]
        kept: list[list[Tensor]] = [[] for _ in seen]
        for i, states in enumerate(self.states):
            noting = {cut.linear: inputs.append for cut, inputs in zip(seen, kept, strict=True)}
            with self._shortened(i), _watched(watchers, noting, stop=not keep):
                try:
                    output = self.run(states)
                except _Enough:
                    continue
            if keep:
                found.append(output)
        for cut, inputs in zip(seen, kept, strict=True):
            cut.inputs = inputs if len(inputs) == len(self.states) else []
        return found

    @contextmanager
    def _shortened(self, index: int) -> Iterator[None]:
        """Shortcuts that know their inputs are taken, for sequence `index`."""
        with ExitStack() as stack:
            for cut in self.shortcuts:
                if cut.inputs:
                    stack.enter_context(cut.taken(index))
            yield

    @torch.no_grad()
    def call_of(self, module: nn.Module, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the first call of a module within the block, for input states (1, T, D)."""
        found: tuple[tuple[Any, ...], dict[str, Any]]
        (found,) = _calls(lambda: self.run(states), [module], lambda args, options: (args, options))
        return found

    def advance(self, outputs: list[Tensor] | None = None) -> None:
        """Move on to the next block, with this one's `outputs`, or by what it gives as it is when they are needed."""
        self.position += 1
        if outputs is not None:
            self.shortcuts = ()
            self._states, self._reached = outputs, self.position


@torch.no_grad()
def verify(decoder: Decoder, tokens: Tensor) -> None:
    """Prove on `tokens` (1, T) that replaying the blocks one by one gives the model's own logits.

    Raises: ValueError with the measured difference if not.
    """
    model, stream = decoder.model, Stream(decoder, tokens)
    for _ in stream.blocks:
        stream.advance()
    expected = logits(model, tokens)
    last, states = stream.blocks[-1], stream.states[0]

    def logits_from(given: Tensor) -> Tensor:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            return (given, *output[1:]) if isinstance(output, tuple) else given

        with hooked([last.register_forward_hook(hook)]):
            return logits(model, tokens)

    found, without = logits_from(states), logits_from(torch.zeros_like(states))
    moved, limit = relative_error(found, expected), SAME_LOGITS[states.dtype]
    if not within(moved, limit) or torch.equal(without, expected):
        raise ValueError(
            f"replaying the {len(stream.blocks)} blocks of {type(model).__name__} does not reproduce its logits: they "
            f"differ by {moved:.2g} relative, expected at most {limit:g}; it cannot be calibrated block by block, "
            "use a data-free method such as rtn"
        )


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's own logits (B, T, V) on `tokens` (B, T)."""
    found: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
    return found


@torch.no_grad()
def _calls(run: Callable[[], object], modules: list[nn.Module], keep: Callable[..., Any]) -> list[Any]:
    """What `keep` makes of the arguments of each call of `modules` in `run`, in order; the last of them ends it."""
    seen: list[Any] = []

    def note(_module: nn.Module, args: Any, options: Any) -> None:
        seen.append(keep(args, options))
        if len(seen) == len(modules):
            raise _Enough

    with hooked(module.register_forward_pre_hook(note, with_kwargs=True) for module in modules), suppress(_Enough):
        run()
    return seen


@contextmanager
def _watched(watchers: Mapping[nn.Module, Watcher], noting: Mapping[nn.Module, Watcher], stop: bool) -> Iterator[None]:
    waiting = set(watchers)

    def shown(module: nn.Module, args: Any) -> None:
        watchers[module](args[0])
        if module in noting:
            noting[module](args[0])
        waiting.discard(module)
        if stop and not waiting:
            raise _Enough

    with hooked(module.register_forward_pre_hook(shown) for module in watchers):
        yield


def _split_call(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Any]:
    """The hidden states of a call, and all else."""
    return args[0] if args else options["hidden_states"], _without_states(args, options)


def _without_states(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    return args[1:], {key: value for key, value in options.items() if args or key != "hidden_states"}


def _equal(left: Any, right: Any) -> bool:
    """Whether two nests of arguments are equal, tensor by tensor."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(value, right[key]) for key, value in left.items())
    return bool(left is right or left == right)


def _cast(nest: Any, dtype: torch.dtype) -> Any:
    """Float tensors of a nest of arguments in `dtype`."""
    if isinstance(nest, Tensor):
        return nest.to(dtype) if nest.is_floating_point() else nest
    if isinstance(nest, tuple | list):
        return type(nest)(_cast(item, dtype) for item in nest)
    if isinstance(nest, dict):
        return {key: _cast(value, dtype) for key, value in nest.items()}
    return nest
