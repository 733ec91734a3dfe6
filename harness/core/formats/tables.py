"""Tables of levels that formats select from.

nf4        NormalFloat: quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3
           and appendix E); 7 negative levels, zero, and 8 positive levels
fp4        4-bit floats of QLoRA's library (bitsandbytes): larger exponent fields mean smaller values, and the only
           subnormal is 1/192 of the largest value; code 8 is negative zero
lloyd_max  the levels with the least mean squared error for a normal distribution of variance 1 (Lloyd 1982,
           Max 1960): each is the mean of the values that are nearest to it
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from harness.core.constants import constant

Table = Literal["nf4", "fp4", "lloyd_max"]

# Probability of NF4's outermost quantile: the mean of 1 - 1/32 and 1 - 1/30, rounded as in the authors' code.
_OUTERMOST = 0.9677083
_BIAS = 3  # exponent bias of FP4
_WIDTHS = {"nf4": (4, 4), "fp4": (4, 4), "lloyd_max": (2, 8)}  # fewest and most bits
_LLOYD_STEPS = 50_000
_LLOYD_TOLERANCE = 1e-12


@constant
def levels(table: Table, bits: int) -> Tensor:
    """The levels (2^bits,) float32 of a table, by code; the largest magnitude of nf4 and fp4 is 1.

    Raises: ValueError if the table has another width.
    """
    least, most = _WIDTHS[table]
    if not least <= bits <= most:
        expected = f"bits={least}" if least == most else f"{least} to {most}"
        raise ValueError(f"bits={bits} does not match table={table}; expected {expected}")
    if table == "nf4":
        return _normal_float()
    return _float4_levels() if table == "fp4" else lloyd_max(bits)


@constant
def ascending(table: Table, bits: int) -> Tensor:
    """The levels of a table, sorted."""
    return levels(table, bits).sort().values


def _normal_float() -> Tensor:
    levels: Tensor = torch.cat([-_quantiles(7), torch.zeros(1), _quantiles(8).flip(0)])
    return levels / levels.max()


def _quantiles(count: int) -> Tensor:
    """Return quantiles (count,) float32 of the standard normal distribution, in decreasing order.

    Their probabilities are evenly spaced from _OUTERMOST towards 1/2, without 1/2 itself, which is the level zero.
    """
    probabilities = torch.linspace(_OUTERMOST, 0.5, count + 1)[:-1]
    quantiles: Tensor = torch.special.ndtri(probabilities.double())
    return quantiles.float()


def _float4_levels() -> Tensor:
    found = torch.tensor([_float4(code) for code in range(16)], dtype=torch.float64)
    return (found / found.max()).float()


def _float4(code: int) -> float:
    """Decode a 4-bit float: the exponent field is subtracted from the bias, and exponent 0 is a subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (_BIAS + 1 - exponent) if exponent else mantissa / 2 * 2.0**-_BIAS
    return -magnitude if sign else magnitude


def lloyd_max(bits: int) -> Tensor:
    """The optimal levels (2^bits,) float32 of a standard normal distribution, ascending, by fixed-point iteration."""
    found = torch.special.ndtri((torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits))
    for _ in range(_LLOYD_STEPS):
        edges = torch.cat([found.new_tensor([-math.inf]), (found[1:] + found[:-1]) / 2, found.new_tensor([math.inf])])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        means: Tensor = (density[:-1] - density[1:]) / torch.special.ndtr(edges).diff()
        done = float((means - found).abs().max()) < _LLOYD_TOLERANCE
        found = means
        if done:
            break
    levels: Tensor = (found - found.flip(0)) / 2
    return levels.float()


def dynamic_levels() -> Tensor:
    """The 256 levels of the signed dynamic map (Dettmers 2015, arXiv 1511.04561, section 3.1), ascending, in float32.

    Each level has a sign, a decimal exponent e from 0 to -6 and a fraction of 6 + e bits: the midpoints of 2^(6 + e)
    equal parts of [0.1, 1], times 10^e. Two more levels are 0 and 1.
    """
    positive = torch.cat([_middles(1 << (6 + e)) * 10.0**e for e in range(0, -7, -1)])
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


def _middles(parts: int) -> Tensor:
    edges = torch.linspace(0.1, 1, parts + 1)
    return (edges[1:] + edges[:-1]) / 2
