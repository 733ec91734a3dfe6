"""What weights of vectors share: codes row by row, in the order in which vectors.h reads them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16)  # of inputs
VECTOR = 8  # inputs of a vector
MOST_BOOKS = 8


def pack_rows(codes: Tensor, wide: bool) -> Tensor:
    """Codes (N, G) of unsigned integers as (N, even) int16, or uint8 if not `wide`; missing codes are 0."""
    return F.pad(codes, (0, codes.shape[1] % 2)).to(torch.int16 if wide else torch.uint8).contiguous()
