"""One block of a tiny model, prepared as in the engine: its input groups, their producers and statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harness.core import InputGroup, IntWeight, Scheme, Stat, Stats
from harness.models import Decoder, input_groups, weight_of
from harness.nn import QuantLinear
from harness.quantization.producers import Discovery
from harness.quantization.scale_search import Trial
from tests.support.decoders import linears
from tests.support.decoders import stream as stream_of

TOKENS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))
GROUP8 = Scheme(name="test", weight=IntWeight(bits=3, granularity="group", group_size=8, scale_dtype="float32"))


class Block:
    """Block `index` of `model` with its input groups; producers are proved on the first sequence."""

    def __init__(self, model: nn.Module, index: int = 0, scheme: Scheme = GROUP8, tokens: Tensor = TOKENS) -> None:
        self.model, self.scheme = model, scheme
        self.prefix = f"{Decoder(model).name(index)}."
        self.stream = stream_of(model, tokens)
        for _ in range(index):
            self.stream.advance()
        block_linears = {name: module for name, module in linears(model).items() if name.startswith(self.prefix)}
        members = input_groups(block_linears, lambda: self.stream.run(self.stream.states[0]))
        self.groups = [
            InputGroup(
                {n: block_linears[n] for n in names}, {n: weight_of(block_linears[n]) for n in names}, scheme=scheme
            )
            for names in members
        ]
        Discovery().producers(self.stream, self.groups, self.prefix)

    def group(self, member: str) -> InputGroup:
        """The group of the linear whose name ends in `member`."""
        return next(group for group in self.groups if any(name.endswith(member) for name in group.linears))

    def inputs(self, group: InputGroup) -> Tensor:
        """The inputs (T, K) of the group, over all sequences."""
        batches: list[Tensor] = []
        reader = next(iter(group.linears.values()))
        self.stream.outputs({reader: lambda inputs: batches.append(inputs.detach().flatten(0, -2))}, keep=False)
        return torch.cat(batches)

    def stats(self, group: InputGroup, needs: Sequence[type[Stat]]) -> Stats:
        collected = Stats(needs, group.in_features)
        self.stream.outputs({next(iter(group.linears.values())): collected.update}, keep=False)
        return collected

    def search(self, group: InputGroup, stats: Stats, tokens: int = 4096) -> None:
        """Let `group.error` measure the output error of a trial scale."""
        group.trial = Trial(self.stream, self.model, group, stats, tokens)


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=tokens, use_cache=False).logits
    return output


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error of `found` against `expected`."""
    reference = expected.detach().double()
    return float((found.detach().double() - reference).norm() / reference.norm())


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    """The codes of every quantized linear."""
    return {name: module.packed.codes for name, module in model.named_modules() if isinstance(module, QuantLinear)}
