"""Divergence of a quantized model from the float model: KL and agreement of next-token distributions, token by token.

The float model's last hidden states are stored, not its logits: they take a hundredth of the space. Its head computes
the logits again, in float, when the quantized model's head computes its logits. So nothing is rounded in between, and
disk space stays bounded for any vocabulary. The quantized model's nll comes from the same logits: its head runs once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.evaluation.perplexity import Scorer
from harness.utils.progress import Track, silent

_TOP = 5
_ROWS = 64  # positions that are compared at once: 12 MiB of logits for a vocabulary of 49152


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
    return _kl(*(_log_softmax(logits) for logits in (reference, quantized)))


def _kl(log_P: Tensor, log_Q: Tensor) -> Tensor:
    """KL (n,) of log probabilities (n, V)."""
    return (log_P - log_Q).mul_(log_P.exp()).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def agreement(reference: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (n, V): whether the likeliest tokens agree (n,), and the share of the five likeliest that do (n,)."""
    top_P, top_Q = (logits.topk(min(_TOP, logits.shape[-1]), dim=-1).indices for logits in (reference, quantized))
    shared = (top_P[:, :, None] == top_Q[:, None, :]).any(-1).double().mean(-1)
    return (top_P[:, 0] == top_Q[:, 0]).double(), shared


@torch.inference_mode()
def compare(
    reference: tuple[Scorer, Sequence[Tensor]],
    quantized: tuple[Scorer, Sequence[Tensor]],
    windows: Tensor,
    track: Track = silent,
    unscored: int = 0,
) -> Divergence:
    """Compare the float model with a quantized one by their last hidden states for each window of `windows` (W, T).

    `reference` (the float model) and `quantized` are pairs: the scorer that turns states into logits, and the states
    (T, D) of each window. The scored positions are those of perplexity: T - 1, without the first `unscored`.
    Raises: ValueError if a divergence is not finite.
    """
    columns: tuple[list[Tensor], ...] = [], [], []
    window_nll: list[float] = []
    scorers = reference[0], quantized[0]
    device = next(quantized[0].model.parameters()).device
    triples = zip(reference[1], quantized[1], windows, strict=True)
    for triple in track(triples, "divergence", len(windows)):
        reference_states, quantized_states, tokens = (tensor.to(device) for tensor in triple)
        total = torch.zeros((), dtype=torch.float64, device=device)
        slices = [*_slices(scorers, (reference_states, quantized_states), tokens, unscored)]
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


def _slices(
    scorers: tuple[Scorer, Scorer], states: tuple[Tensor, Tensor], tokens: Tensor, unscored: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """KL, agreements and summed nll of one window, one slice of positions at a time."""
    logits = (scorer.slices(hidden, tokens, unscored) for scorer, hidden in zip(scorers, states, strict=True))
    for (P, _), (Q, targets) in zip(*logits, strict=True):
        parts = [_compared(*part) for part in zip(*(each.split(_ROWS) for each in (P, Q, targets)), strict=True)]
        kl, top1, top5, log_likelihood = (torch.cat(values) for values in zip(*parts, strict=True))
        # The sum of F.cross_entropy, to the bit: it adds the same numbers in the same order.
        nll = F.nll_loss(log_likelihood[:, None], torch.zeros_like(targets), reduction="sum")
        yield kl, top1, top5, nll


def _compared(P: Tensor, Q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL, agreements and log likelihoods under Q of the targets, (n,) each, of few logits: they stay in the cache."""
    log_P, log_Q = _log_softmax(P), _log_softmax(Q)
    return _kl(log_P, log_Q), *agreement(P, Q), log_Q.gather(-1, targets[:, None])[:, 0]
