"""A model whose prefill and decode step are compiled: one call each, without Python between the operators.

At one token a step, Python and the launches of some hundred small operators can take longer than reading the weights.
A server compiles them away, so a speedup has to be measured in that world too. The KV cache is static: memory for all
tokens, allocated once, and a tensor with the position of the next token, so that a decode step is the same sequence of
operations at every position. torch.compile makes the calls; on a GPU, each is then captured as a CUDA graph. The latter
has not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from harness.calibration import SAME_FUNCTION, relative_error, within
from harness.evaluation.workload import Eager, Pair, last_logits
from harness.nn import QuantLinear, accepted, cache_of, kvcache, one_line_errors

_SETTING, _REMEDY = "measure.runtime=compiled", "use measure.runtime=eager"
_PROVED_STEPS = 3
_SAME_CODED = (
    0.1  # relative error of logits: fused operators round differently, which moves some codes of inputs by one
)
# Guards would check at each call that everything is as it was when compiled, and assertions that every operator returns
# the sizes that were expected. Here they always are.
_OPTIONS = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe, "size_asserts": False, "alignment_asserts": False}

Forward = Callable[[Tensor], Tensor]


class Compiled:
    """The calls of a model with compiled forwards; the constructor compiles, and proves that logits are the same.

    prompt   (B, P)
    decoded  (B, steps)

    Raises: ValueError, in one line, if the model cannot be compiled or has other logits then.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, decoded: Tensor) -> None:
        self.model, self.prompt, self.decoded = model, prompt, decoded
        self._token = decoded[:, :1].clone()
        self._start = torch.zeros((), dtype=torch.int64, device=prompt.device)
        with one_line_errors(model, _SETTING, _REMEDY):
            output = model(input_ids=prompt, **accepted(model, use_cache=True), **last_logits(model))
            length = prompt.shape[1] + decoded.shape[1]
            self._cache = kvcache.fixed(model, cache_of(output), length, self._start)
            self._prefill, self._step = _compile(self._forward, prompt), _compile(self._forward, self._token)
            self._prove(output)

    def prefill(self) -> Any:
        self._read_prompt()
        return self._cache

    def decode(self, cache: Any) -> Callable[[], Any]:
        steps = self._steps()
        return lambda: next(steps)

    def _forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the last of `tokens` (B, T), which are added to the cache."""
        output = self.model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **last_logits(self.model))
        logits: Tensor = output.logits[:, -1]
        return logits

    def _read_prompt(self) -> Tensor:
        self._start.zero_()
        return self._prefill(self.prompt)

    def _steps(self) -> Iterator[Tensor]:
        """The logits (B, V) after each of the decoded tokens."""
        for i, column in enumerate(self.decoded.split(1, dim=1)):
            self._token.copy_(column)
            self._start.fill_(self.prompt.shape[1] + i)
            yield self._step(self._token)

    def _prove(self, output: Any) -> None:
        """Compare the logits of the prompt, and of the first decode steps, with those of eager calls.

        `output` is that of the eager prefill.
        Raises: ValueError if a relative error is larger than rounding explains.
        """
        step = Eager(self.model, self.prompt, self.decoded).decode(cache_of(output))
        count = min(_PROVED_STEPS, self.decoded.shape[1])
        eager = chain([output], (step() for _ in range(count)))
        compiled = chain([self._read_prompt()], self._steps())
        limit = _limit(self.model, output.logits.dtype)
        for i, (expected, logits) in enumerate(zip((each.logits[:, -1] for each in eager), compiled, strict=False)):
            error = relative_error(logits, expected)
            if not within(error, limit):
                raise ValueError(
                    f"{_SETTING}: the logits of {type(self.model).__name__} after {i} decode steps differ from those "
                    f"of eager calls by {error:.2g}, expected at most {limit:g}; {_REMEDY}"
                )


@torch.inference_mode()
def prepare(models: tuple[nn.Module, nn.Module], prompt: Tensor, decoded: Tensor) -> Pair:
    """The compiled calls of a model and of its baseline; a model that is its own baseline is compiled once."""
    torch.compiler.reset()  # what earlier runs in this process have compiled
    first = Compiled(models[0], prompt, decoded)
    return first, first if models[1] is models[0] else Compiled(models[1], prompt, decoded)


def _limit(model: nn.Module, dtype: torch.dtype) -> float:
    """The relative error of logits that rounding explains."""
    coded = any(isinstance(module, QuantLinear) and module.quantizes_inputs for module in model.modules())
    return _SAME_CODED if coded else SAME_FUNCTION[dtype]


def _compile(forward: Forward, tokens: Tensor) -> Forward:
    """`forward` as one call; it is always called with `tokens`, whose values may change."""
    # isolated: without guards, what was compiled for one model or shape would be used for all. A copy of the options,
    # because torch takes the filter out of them, and a second call would check guards for a millisecond at each token.
    compiled: Forward = torch.compile(  # type: ignore[call-overload]  # the overloads of torch 2.13 lack isolate_...
        forward, fullgraph=True, dynamic=False, isolate_recompiles=True, options=dict(_OPTIONS)
    )
    return _captured(compiled, tokens) if tokens.is_cuda else compiled


def _captured(forward: Forward, tokens: Tensor) -> Forward:
    """`forward` as a CUDA graph; its output is the same memory at every call."""
    stream = torch.cuda.Stream(tokens.device)
    stream.wait_stream(torch.cuda.current_stream(tokens.device))
    with torch.cuda.stream(stream):  # builds kernels and workspaces, which a capture must not
        forward(tokens)
    torch.cuda.current_stream(tokens.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward(tokens)

    def replay(_tokens: Tensor) -> Tensor:
        graph.replay()
        return logits

    return replay
