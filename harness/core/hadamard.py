"""Orthogonal transforms with flat entries for any size: Hadamard matrices where one can be constructed, else Hartley's.

Q_n is a Kronecker product of small orthogonal factors, so x Q_n costs n times the sum of their sizes, and no n x n
matrix is built. For n = 2^k c with c odd:

    c = 1              Sylvester matrices: Kronecker powers of [[1, 1], [1, -1]]
    c > 1              a Paley matrix of the smallest possible order c 2^t with t from 2 to k, times Sylvester matrices.
                       The quadratic residues of a prime q give order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4);
                       576 is 36 times 16
    none, or k < 2     a Hartley matrix of size c, cos + sin of 2 pi i j / c: its entries reach sqrt(2 / c), whereas all
                       Hadamard entries have magnitude sqrt(1 / c)

Paper: Paley 1933, J. Math. Phys. 12; Tseng et al. 2024, arXiv 2402.04396, section 3 (why such matrices, after random
signs, make weights and Hessians incoherent).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.core.constants import constant

_LARGEST_PALEY = 512  # limit of the cost, because a factor is applied as a dense matrix
_CHUNK = 6  # largest Sylvester factor 2^6: small enough to be cheap, large enough for an efficient matmul


def rotate(values: Tensor, size: int | None = None) -> Tensor:
    """x Q_n for values x (..., n), in the same dtype; with `size`, x_i Q_size for each part x_i of that size."""
    if size is None:
        return _apply(values, transposed=False)
    return _apply(values.unflatten(-1, (-1, size)), transposed=False).view(values.shape)


def unrotate(values: Tensor) -> Tensor:
    """x Q_n^T for values x (..., n): the inverse of `rotate`."""
    return _apply(values, transposed=True)


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """Random signs +1 and -1, (count,) float32."""
    return torch.randint(0, 2, (count,), generator=generator, device=generator.device).float() * 2 - 1


def factors(size: int) -> tuple[Tensor, ...]:
    """The orthogonal factors (float64) whose Kronecker product is Q_n, n = `size`.

    Raises: ValueError if `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size={size} is out of range; expected 1 or more")
    dense = dense_factor(size)
    matrices = [] if dense is None else [dense]
    twos = (size // (1 if dense is None else len(dense))).bit_length() - 1
    for parts in range(-(-twos // _CHUNK), 0, -1):  # equal parts: a factor of size 2 alone costs as much as size 64
        part = twos // parts
        matrices.append(_sylvester(part) / math.sqrt(1 << part))
        twos -= part
    return tuple(matrices) or (torch.ones(1, 1, dtype=torch.float64),)


def dense_factor(size: int) -> Tensor | None:
    """The first factor of Q_n (float64), n = `size`, if it is a Paley or Hartley matrix; all others are Sylvester's."""
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    if odd == 1:
        return None
    for used in range(2, twos + 1):
        if (matrix := _paley(odd << used)) is not None:
            return matrix / math.sqrt(odd << used)
    return _hartley(odd)


@constant
def _factors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(factor.to(device, dtype) for factor in factors(size))


def _apply(values: Tensor, transposed: bool) -> Tensor:
    shape, stride = values.shape, 1
    for factor in reversed(_factors(shape[-1], values.dtype, values.device)):
        size = len(factor)
        if stride == 1:
            values = values.reshape(-1, size) @ (factor.T if transposed else factor)
        else:
            values = (factor if transposed else factor.T) @ values.reshape(-1, size, stride)
        stride *= size
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
    """A matrix of +1 and -1 with M M^T = order I; None if no prime gives a matrix of this order."""
    if order > _LARGEST_PALEY:
        return None
    if _is_prime(order - 1):  # order is a multiple of 4
        matrix = _bordered(order - 1)
        matrix[1:, 0] = -1  # skew: M + M^T = 2 I
        return matrix + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):
        symmetric, identity = _bordered(half - 1), torch.eye(half, dtype=torch.float64)
        plus, minus = (torch.tensor(cells, dtype=torch.float64) for cells in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
        return torch.kron(symmetric, plus) + torch.kron(identity, minus)
    return None


def _bordered(prime: int) -> Tensor:
    """The quadratic residue matrix of a prime with a border of ones: (prime + 1, prime + 1), with a zero diagonal."""
    residues = {i * i % prime for i in range(1, prime)}
    legendre = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = matrix[1:, 0] = 1
    matrix[1:, 1:] = legendre[(index[None] - index[:, None]) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
