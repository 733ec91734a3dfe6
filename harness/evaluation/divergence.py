"""Divergence from the float model: what its next-token distributions lose, token by token, on the same stream.

Kept of the float model are its last hidden states, not its logits: they are a hundredth of the size, and the head that
turns them into logits runs again, in float, beside the quantized model's own. So nothing is rounded on the way, and
disk space stays bounded for any vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.evaluation.perplexity import Scorer
from harness.utils.progress import Track, silent

_TOP = 5


@dataclass(frozen=True)
class Divergence:
    """Per token of the stream: KL(float || found) in nats, and agreement of the likeliest tokens.

    kl    (n,) float64
    top1  (n,) whether both have the same likeliest token
    top5  (n,) share of the float model's five likeliest tokens that are among the other's five
    nll   mean negative log likelihood of `found` by the logits of this pass
    """

    kl: Tensor
    top1: Tensor
    top5: Tensor
    nll: float
    window_kl: list[float]

    @property
    def metrics(self) -> dict[str, float]:
        """What the record keeps: mean, median and 99th percentile of KL, and mean agreement."""
        middle, high = torch.quantile(self.kl, torch.tensor([0.5, 0.99], dtype=self.kl.dtype)).tolist()
        agreement = {"top1_agreement": float(self.top1.mean()), "top5_agreement": float(self.top5.mean())}
        return {"kl": float(self.kl.mean()), "kl_median": middle, "kl_p99": high} | agreement


def token_kl(expected: Tensor, found: Tensor) -> Tensor:
    """KL(P || Q) (n,) in nats, of P = softmax(expected) and Q = softmax(found), both logits (n, V).

    Logs of probabilities are float32, or float64 where the logits are.
    """
    P, Q = (F.log_softmax(each.to(torch.promote_types(each.dtype, torch.float32)), -1) for each in (expected, found))
    return (P.exp() * (P - Q)).sum(-1)


def agreement(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (n, V): whether the likeliest tokens agree (n,), and the share of the five likeliest that do (n,)."""
    ours, theirs = (each.topk(min(_TOP, each.shape[-1]), dim=-1).indices for each in (expected, found))
    shared = (ours[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1)
    return (ours[:, 0] == theirs[:, 0]).double(), shared


@torch.inference_mode()
def compare(
    expected: tuple[Scorer, Sequence[Tensor]],
    found: tuple[Scorer, Sequence[Tensor]],
    windows: Tensor,
    track: Track = silent,
    unscored: int = 0,
) -> Divergence:
    """Compare two models by the last states that each gave for every window of `windows` (W, T).

    `expected` and `found` are a scorer, which turns states into logits, and the states of each window. Scored are the
    positions that perplexity scores: T - 1, less the first `unscored`.
    Raises: ValueError if a divergence is not finite.
    """
    kl, top1, top5, nll = list[Tensor](), list[Tensor](), list[Tensor](), list[float]()
    device = next(found[0].model.parameters()).device
    pairs = zip(expected[1], found[1], windows, strict=True)
    for states in track(pairs, "divergence", len(windows)):
        ours, theirs, tokens = (each.to(device) for each in states)
        parts = [*_parts((expected[0], found[0]), (ours, theirs), tokens, unscored)]
        for kept, values in zip((kl, top1, top5), [*zip(*parts, strict=True)][:3], strict=True):
            kept.append(torch.cat(values).double().cpu())
        nll.append(math.fsum(float(part[3]) for part in parts) / (len(tokens) - 1 - unscored))
    if not all(bool(torch.isfinite(each).all()) for each in kl):
        raise ValueError("the divergence from the float model is not finite: logits are too far apart for float32")
    means = [float(each.mean()) for each in kl]
    return Divergence(torch.cat(kl), torch.cat(top1), torch.cat(top5), math.fsum(nll) / len(nll), means)


def _parts(
    scorers: tuple[Scorer, Scorer], states: tuple[Tensor, Tensor], tokens: Tensor, unscored: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """KL, agreements and summed nll of one window, a slice of positions at a time."""
    both = (scorer.slices(each, tokens, unscored) for scorer, each in zip(scorers, states, strict=True))
    for (P, _), (Q, wanted) in zip(*both, strict=True):
        yield token_kl(P, Q), *agreement(P, Q), F.cross_entropy(Q, wanted, reduction="sum").double()
