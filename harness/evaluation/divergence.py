"""Divergence of a quantized model from the float model: KL and agreement of next-token distributions, token by token.

The last hidden states of both models are stored, not their logits: they take a hundredth of the space, so disk space
stays bounded for any vocabulary. Each head computes its logits from them, in float, when both are compared, so nothing
is rounded in between. The float model's log probabilities are stored too where they fit, and its head then runs once
for many runs. The quantized model's nll comes from the same logits: its head runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.evaluation.float_head import NOTHING_STORED, ROWS, Expected, FloatHead, likeliest, log_softmax
from harness.evaluation.perplexity import Scorer
from harness.utils.progress import Track, silent


@dataclass(frozen=True)
class Divergence:
    """For each scored token of the stream: KL(float || quantized) in nats, and agreement of the likeliest tokens.

    kl          (n,) float64
    top1        (n,) whether both models have the same likeliest token
    top5        (n,) share of the float model's five likeliest tokens that are among the quantized model's five
    window_nll  mean negative log likelihood of each window under the quantized model
    window_kl   mean KL of each window
    """

    kl: Tensor
    top1: Tensor
    top5: Tensor
    window_nll: list[float]
    window_kl: list[float]

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the record: mean, median and 99th percentile of KL, and mean agreement."""
        median, p99 = torch.quantile(self.kl, torch.tensor([0.5, 0.99], dtype=self.kl.dtype)).tolist()
        agreement = {"top1_agreement": float(self.top1.mean()), "top5_agreement": float(self.top5.mean())}
        return {"kl": float(self.kl.mean()), "kl_median": median, "kl_p99": p99} | agreement


def token_kl(reference: Tensor, quantized: Tensor) -> Tensor:
    """KL(P || Q) (n,) in nats, of P = softmax(reference) and Q = softmax(quantized), both logits (n, V).

    Log probabilities are float32, or float64 if the logits are float64.
    """
    return _kl(log_softmax(reference), log_softmax(quantized))


def _kl(log_P: Tensor, log_Q: Tensor) -> Tensor:
    """KL (n,) of log probabilities (n, V)."""
    return (log_P - log_Q).mul_(log_P.exp()).sum(-1)


def agreement(top_P: Tensor, top_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Of the likeliest tokens (n, 5): whether the first agrees (n,), and the share of the five that agree (n,)."""
    shared = (top_P[:, :, None] == top_Q[:, None, :]).any(-1).double().mean(-1)
    return (top_P[:, 0] == top_Q[:, 0]).double(), shared


@torch.inference_mode()
def compare(
    reference: tuple[Scorer, Sequence[Tensor]],
    quantized: tuple[Scorer, Sequence[Tensor]],
    windows: Tensor,
    track: Track = silent,
    unscored: int = 0,
    head: FloatHead = NOTHING_STORED,
) -> Divergence:
    """Compare the float model with a quantized one by their last hidden states for each window of `windows` (W, T).

    `reference` (the float model) and `quantized` are pairs: the scorer that turns states into logits, and the states
    (T, D) of each window. The scored positions are those of perplexity: T - 1, without the first `unscored`. Where
    `head` has the float model's predictions stored, its scorer is not called.
    Raises: ValueError if a divergence is not finite.
    """
    columns: tuple[list[Tensor], ...] = [], [], []
    window_nll: list[float] = []
    scorers = reference[0], quantized[0]
    device = next(quantized[0].model.parameters()).device
    triples = zip(reference[1], quantized[1], windows, strict=True)
    for i, triple in enumerate(track(triples, "divergence", len(windows))):
        reference_states, quantized_states, tokens = (tensor.to(device) for tensor in triple)
        total = torch.zeros((), dtype=torch.float64, device=device)
        expected = partial(_expected, head, i, scorers[0], reference_states[unscored:-1])
        slices = [*_slices(expected, scorers[1].slices(quantized_states, tokens, unscored))]
        for column, values in zip(columns, [*zip(*slices, strict=True)][:3], strict=True):
            column.append(torch.cat(values).double().cpu())
        for *_, nll in slices:
            total += nll.double()
        window_nll.append(float(total) / (len(tokens) - 1 - unscored))
    kl, top1, top5 = columns
    if not all(bool(torch.isfinite(window).all()) for window in kl):
        raise ValueError("the divergence from the float model is not finite: logits are too far apart for float32")
    window_kl = [float(window.mean()) for window in kl]
    return Divergence(torch.cat(kl), torch.cat(top1), torch.cat(top5), window_nll, window_kl)


def of_itself(windows: Tensor, unscored: int = 0) -> Divergence:
    """The divergence of a model from itself, which needs no logits: KL 0, and all tokens agree; without any nll."""
    count = windows.shape[0] * (windows.shape[1] - 1 - unscored)
    same = torch.ones(count, dtype=torch.float64)
    return Divergence(torch.zeros_like(same), same, same, [], [0.0] * len(windows))


def _expected(head: FloatHead, window: int, reference: Scorer, states: Tensor, number: int, rows: slice) -> Expected:
    """The float model's predictions for a slice of a window, from its `states` (T, D) at the scored positions."""
    return head.expected((window, number), lambda: Expected.of(reference.logits(states[rows])))


def _slices(
    expected: Callable[[int, slice], Expected], slices: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """KL, agreements and summed nll of one window, one slice of positions at a time."""
    start = 0
    for number, (Q, targets) in enumerate(slices):
        rows = slice(start, start := start + len(Q))
        parts = zip(expected(number, rows).split(), Q.split(ROWS), targets.split(ROWS), strict=True)
        columns = zip(*[_compared(*part) for part in parts], strict=True)
        kl, top1, top5, log_likelihood = (torch.cat(values) for values in columns)
        # The sum of F.cross_entropy, to the bit: it adds the same numbers in the same order.
        nll = F.nll_loss(log_likelihood[:, None], torch.zeros_like(targets), reduction="sum")
        yield kl, top1, top5, nll


def _compared(expected: Expected, Q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, agreements and log likelihoods under Q of the targets, (n,) each, of few logits Q (n, V)."""
    log_Q = log_softmax(Q)
    kl = _kl(expected.log_probs, log_Q)
    return kl, *agreement(expected.top, likeliest(Q)), log_Q.gather(-1, targets[:, None])[:, 0]
