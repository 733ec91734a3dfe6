"""Orthogonal transforms with flat entries for any size: Hadamard matrices, and Hartley's where none is constructed.

Q_n is a Kronecker product of small orthogonal factors, so that x Q_n costs n times the sum of their sizes and no matrix
of size n x n is made. For n = 2^k c with c odd:

    c = 1              Sylvester's: products of [[1, 1], [1, -1]]
    c > 1              the smallest c 2^t with t from 2 to k that Paley constructs: from the quadratic residues of a
                       prime q, an order of q + 1 (q = 3 mod 4) or of 2 (q + 1) (q = 1 mod 4); 576 is 36 times 16
    none, or k < 2     Hartley's of size c, cos + sin of 2 pi i j / c: entries up to sqrt(2 / c), where Hadamard's are
                       all of magnitude sqrt(1 / c)

Paper: Paley 1933, J. Math. Phys. 12; Tseng et al. 2024, arXiv 2402.04396, section 3 (why such matrices, with random
signs before them, make weights and Hessians incoherent).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_LARGEST_PALEY = 512  # a factor is applied as a dense matrix
_CHUNK = 6  # 2^6: factors of a power of two, small enough to cost little, large enough to be a matmul


def rotate(values: Tensor) -> Tensor:
    """x Q_n of values x (..., n), in their dtype."""
    return _apply(values, transposed=False)


def unrotate(values: Tensor) -> Tensor:
    """x Q_n^T of values x (..., n): undoes `rotate`."""
    return _apply(values, transposed=True)


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """(count,) random +1 and -1, float32."""
    return torch.randint(0, 2, (count,), generator=generator, device=generator.device).float() * 2 - 1


def factors(size: int) -> tuple[Tensor, ...]:
    """The orthogonal factors (float64) whose Kronecker product is Q_n, n = `size`.

    Raises: ValueError for a size under 1.
    """
    if size < 1:
        raise ValueError(f"a transform of size {size} does not exist; expected 1 or more")
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    found = []
    if odd > 1:
        used, first = next(
            ((t, matrix) for t in range(2, twos + 1) if (matrix := _paley(odd << t)) is not None), (0, None)
        )
        found.append(_hartley(odd) if first is None else first / math.sqrt(odd << used))
        twos -= used
    for parts in range(-(-twos // _CHUNK), 0, -1):  # even parts: a factor of 2 by itself costs as much as one of 64
        part = twos // parts
        found.append(_sylvester(part) / math.sqrt(1 << part))
        twos -= part
    return tuple(found) or (torch.ones(1, 1, dtype=torch.float64),)


@functools.lru_cache(maxsize=64)
def _factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(factor.to(device, dtype) for factor in factors(size))


def _apply(values: Tensor, transposed: bool) -> Tensor:
    shape, rest = values.shape, 1
    for factor in reversed(_factors(shape[-1], values.dtype, values.device)):
        size = len(factor)
        if rest == 1:
            values = values.reshape(-1, size) @ (factor.T if transposed else factor)
        else:
            values = (factor if transposed else factor.T) @ values.reshape(-1, size, rest)
        rest *= size
    return values.reshape(shape)


def _sylvester(twos: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(twos):
        matrix = torch.kron(matrix, step)
    return matrix


def _hartley(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    angle = torch.outer(index, index) % size * (2 * math.pi / size)
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def _paley(order: int) -> Tensor | None:
    """A matrix of +1 and -1 with M M^T = order I, None where no prime gives one of this order."""
    if order > _LARGEST_PALEY:
        return None
    if _is_prime(order - 1):  # order is a multiple of 4
        matrix = _bordered(order - 1)
        matrix[1:, 0] = -1  # skew: M + M^T = 2 I
        return matrix + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        symmetric, one = _bordered(half - 1), torch.eye(half, dtype=torch.float64)
        plus, minus = (torch.tensor(cells, dtype=torch.float64) for cells in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
        return torch.kron(symmetric, plus) + torch.kron(one, minus)
    return None


def _bordered(prime: int) -> Tensor:
    """The quadratic residue matrix of a prime, bordered by ones: (prime + 1) square with a zero diagonal."""
    residues = {i * i % prime for i in range(1, prime)}
    legendre = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = matrix[1:, 0] = 1
    matrix[1:, 1:] = legendre[(index[None] - index[:, None]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
