"""Calibration activations at one decoder block: captured before the first block, moved past each block by replay."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration.calls import INSTEAD, Enough, calls_of, cast, equal, split, without_states
from harness.calibration.proofs import SAME_LOGITS, relative_error, within
from harness.calibration.shortcut import Shortcut
from harness.models import Decoder, logits
from harness.nn import first_of, hooked
from harness.utils.explain import reason

Watcher = Callable[[Tensor], None]
Watched = deque[Tensor]


class Stream:
    """The inputs of one decoder block for every sequence, and the other arguments that the model passes to its blocks.

    Holds the hidden states (1, T, D) of all sequences at one block, and of no other block. `advance` only notes that
    the blocks so far are final; reading `states` runs them.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor) -> None:
        """Run the model on `tokens` (B, T) int64 up to its first block, one sequence at a time.

        Raises: ValueError if the blocks are called in a way that cannot be replayed.
        """
        model, self.blocks = decoder.model, decoder.blocks
        self.position = 0
        self._count = decoder.count
        _check_calls(decoder)
        calls = calls_of(partial(logits, model, tokens[:1]), self.blocks, lambda *call: call)
        self.calls = [without_states(*call) for call in calls]
        self._by_name = [not args for args, _ in calls]  # whether the model passes the hidden states by name
        if len(self.calls) != len(self.blocks):
            raise _refused(model, f"calls {len(self.calls)} of its {len(self.blocks)} blocks, expected each once")
        self._states: list[Tensor] = []
        self._reached = 0
        self.shortcuts: Sequence[Shortcut] = ()  # of the block at `position`
        for sequence in tokens:
            ((states, arguments),) = calls_of(partial(logits, model, sequence[None]), self.blocks[:1], split)
            if not equal(arguments, self.calls[0]):
                raise _refused(model, "passes its blocks token-dependent arguments besides the hidden states")
            self._states.append(states)

    def copy(self) -> Stream:
        """A stream at the same block with the same inputs, which advances on its own."""
        copied = copy.copy(self)  # shallow: `calls` never change, and `_states` is replaced as a whole
        copied.shortcuts = ()
        return copied

    @torch.no_grad()
    def run(self, states: Tensor, block: nn.Module | None = None) -> Tensor:
        """Output states of the block at `position` (or a copy of it) for input states (1, T, D)."""
        return self._run(self.position, states, block)

    def run_to_train(self, states: Tensor, position: int | None = None) -> Tensor:
        """Like `run`, perhaps of the block at another `position`; the caller decides about gradients."""
        return self._run(self.position if position is None else position, states)

    def _run(self, position: int, states: Tensor, block: nn.Module | None = None) -> Tensor:
        args, options = self.calls[position]
        args, options = cast(args, states.dtype), cast(options, states.dtype)
        if self._by_name[position]:
            options = {"hidden_states": states, **options}
        else:
            args = (states, *args)
        output = first_of((block or self.blocks[position])(*args, **options))
        if not isinstance(output, Tensor):
            raise ValueError(
                f"block {position} returns a {type(output).__name__}, expected hidden states or a tuple that starts "
                f"with them; {INSTEAD}"
            )
        return output

    @torch.no_grad()
    def onward(self, states: Tensor) -> Tensor:
        """Output states of the last block, for input states (1, T, D) of the block at `position`."""
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
        """Run the blocks up to `position`, in their present state."""
        while self._reached < self.position:
            outputs = []
            for i, states in enumerate(self._states):
                with self._shortened(i):
                    outputs.append(self._run(self._reached, states))
            self._states = outputs
            self._reached += 1
            self.shortcuts = ()

    def outputs(
        self, watchers: Mapping[nn.Module, Watcher], keep: bool, begin: Callable[[int], None] = lambda _index: None
    ) -> list[Tensor]:
        """Run the block on each sequence and pass the inputs of the watched linears to their watchers.

        `begin` is called with the index of each sequence before the block runs on it.
        Returns: the outputs with `keep`, else nothing: each forward then ends once all watched linears were called.
        """
        outputs = []
        new = [cut for cut in self.shortcuts if cut.linear in watchers and not cut.inputs]
        inputs_of: list[list[Tensor]] = [[] for _ in new]
        for i, states in enumerate(self.states):
            begin(i)
            waiting = Counter[nn.Module]() if keep else Counter({each: self._count(each) for each in watchers})
            recorders = {cut.linear: inputs.append for cut, inputs in zip(new, inputs_of, strict=True)}
            with self._shortened(i), _watched(watchers, recorders, waiting):
                try:
                    output = self.run(states)
                except Enough:
                    continue
            if keep:
                outputs.append(output)
        for cut, inputs in zip(new, inputs_of, strict=True):
            cut.inputs = [*inputs] if len(inputs) == len(self.states) else []
        return outputs

    def watch(self, index: int, block: nn.Module, twins: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, Watched]:
        """Run `block`, a copy of the block at `position`, on one sequence, until all watched linears were called.

        `twins` are linears of the block, and their copies, which are watched.
        Returns: the inputs of each copy's calls, by its original.
        """
        inputs: dict[nn.Module, Watched] = {linear: deque() for linear in twins}
        watchers = {twin: inputs[linear].append for linear, twin in twins.items()}
        waiting = Counter({twin: self._count(linear) for linear, twin in twins.items()})
        with _watched(watchers, {}, waiting), suppress(Enough):
            self.run(self.states[index], block)
        return inputs

    @contextmanager
    def _shortened(self, index: int) -> Iterator[None]:
        """Take the shortcuts whose inputs are stored, for sequence `index`."""
        with ExitStack() as stack:
            for cut in self.shortcuts:
                if cut.inputs:
                    stack.enter_context(cut.taken(index))
            yield

    @torch.no_grad()
    def call_of(self, module: nn.Module, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the first call of a module inside the block, for input states (1, T, D)."""
        call: tuple[tuple[Any, ...], dict[str, Any]]
        (call,) = calls_of(lambda: self.run(states), [module], lambda args, options: (args, options))
        return call

    def advance(self, outputs: list[Tensor] | None = None) -> None:
        """Move to the next block, with the `outputs` of this block; None: compute them later, when they are needed."""
        self.position += 1
        if outputs is not None:
            self.shortcuts = ()
            self._states, self._reached = outputs, self.position


@torch.no_grad()
def verify(decoder: Decoder, tokens: Tensor) -> None:
    """Prove on `tokens` (1, T) that replaying the blocks one by one reproduces the logits of the model.

    Raises: ValueError with the measured error if it does not.
    """
    model, stream = decoder.model, Stream(decoder, tokens)
    other = Stream(decoder, tokens[:, :1].expand_as(tokens))
    for name, *calls in zip(decoder.names, stream.calls, other.calls, strict=True):
        if not equal(*calls):  # a later block may read what an earlier one computed besides the hidden states
            raise _refused(model, f"passes {name} token-dependent arguments besides the hidden states")
    for _ in stream.blocks:
        stream.advance()
    expected = logits(model, tokens)
    last = stream.blocks[-1]
    try:
        states = stream.states[0]
    except (AttributeError, LookupError, RuntimeError, TypeError) as failure:  # of the model's own code
        raise _refused(model, f"fails when one block is run alone ({reason(failure, 60)})") from failure

    def logits_from(last_states: Tensor) -> Tensor:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            make = getattr(output, "_make", type(output))  # of a named tuple
            return make([last_states, *output[1:]]) if isinstance(output, tuple | list) else last_states

        with hooked([last.register_forward_hook(hook)]):
            return logits(model, tokens)

    replayed, from_zeros = logits_from(states), logits_from(torch.zeros_like(states))
    error, limit = relative_error(replayed, expected), SAME_LOGITS[states.dtype]
    if not within(error, limit) or torch.equal(from_zeros, expected):  # equal: the model ignores its blocks
        raise ValueError(
            f"replaying the {len(stream.blocks)} blocks of {type(model).__name__} does not reproduce its logits: the "
            f"relative error is {error:.2g}, expected at most {limit:g}; {INSTEAD}"
        )


def _check_calls(decoder: Decoder) -> None:
    """Check that each block is called once in a forward, and that no two blocks share weights.

    Raises: ValueError if a block is not called once, or a rewrite of one block would change another.
    """
    decoder.require()
    for name, count in zip(decoder.names, decoder.calls, strict=True):
        if count != 1:
            raise _refused(decoder.model, f"calls {name} {count} times in a forward, expected each block once")
    owners: dict[nn.Parameter, str] = {}
    for name, block in zip(decoder.names, decoder.blocks, strict=True):
        for parameter in block.parameters():
            other = owners.setdefault(parameter, name)
            if other != name:
                raise _refused(decoder.model, f"shares weights between {other} and {name}")


def _refused(model: nn.Module, why: str) -> ValueError:
    return ValueError(f"{type(model).__name__} {why}; {INSTEAD}")


@contextmanager
def _watched(
    watchers: Mapping[nn.Module, Watcher], recorders: Mapping[nn.Module, Watcher], waiting: Counter[nn.Module]
) -> Iterator[None]:
    """Pass inputs to the watchers, and end the run after as many calls as `waiting` has, if it is not empty."""
    left = ends = waiting.total()

    def hook(module: nn.Module, args: Any) -> None:
        watchers[module](args[0])
        if module in recorders:
            recorders[module](args[0])
        nonlocal left
        left -= waiting[module] > 0
        waiting[module] -= 1
        if ends and not left:
            raise Enough

    with hooked(module.register_forward_pre_hook(hook) for module in watchers):
        yield
