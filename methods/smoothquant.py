"""SmoothQuant: move the quantization difficulty from activations to weights, with one scale per channel.

Paper: Xiao et al. 2022, arXiv 2211.10438, equation 4: s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha).
Differs: every proved producer absorbs a scale, including up_proj before down_proj and v_proj before o_proj; in the
    authors' code (mit-han-lab/smoothquant smooth.py) only norms do, as with `pairs=norms`. With `search`, alpha is
    chosen for each group by the output error of its module, as AWQ chooses its scales. Inputs that are zero on all
    calibration tokens count as average inputs, with a warning; the authors' lower bound of their maximum would round
    their weights to zero. Where all maxima are below it, the bound is relative to the largest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.core import InputGroup, Method, MinMax, Stats
from harness.core.solvers.silent import bounded, magnitudes, warn_silent

_TINY = 1e-5  # the authors' lower bound of both maxima
_ALPHAS = tuple(i / 20 for i in range(6, 20))  # 0.3 to 0.95


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Method):
    """Smooths the activations, and rounds to nearest unless a later method quantizes.

    alpha   share of the difficulty that moves to the weights: 0.5 for OPT and BLOOM, 0.8 to 0.9 for Llama and Mistral
    pairs   all: every proved producer absorbs a scale; norms: only norms, as in the paper
    search  choose alpha for each group; `alpha` is one of the candidates
    """

    needs: ClassVar = (MinMax,)

    alpha: float = 0.8
    pairs: Literal["all", "norms"] = "all"
    search: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is out of range; expected 0 to 1")

    @property
    def searches(self) -> bool:
        return self.search

    def transform(self, group: InputGroup, stats: Stats) -> None:
        if group.producer is None or (self.pairs == "norms" and not group.producer.is_norm):
            return
        weights = [*group.weights.values(), *group.others.values()]
        W_max = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
        X_max = stats[MinMax].absmax.to(W_max.device)
        silent = X_max == 0
        if silent.any() and not silent.all():
            warn_silent(silent, "they get the middle smoothing scale")
        if not self.search:
            group.rescale(smoothing_scale(X_max, W_max, self.alpha))
            return
        best = torch.ones_like(W_max)
        lowest = group.error(best)
        for alpha in (self.alpha, *_ALPHAS):
            scale = smoothing_scale(X_max, W_max, alpha)
            error = group.error(scale, lowest)
            if error < lowest:
                best, lowest = scale, error
        group.rescale(best)


def smoothing_scale(absmax: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Equation 4: scales (K,) for maxima of inputs `absmax` (K,) and of weight columns `columns` (K,)."""
    return bounded(magnitudes(absmax, _TINY) ** alpha / bounded(columns, _TINY) ** (1 - alpha), _TINY)
