"""Random-matrix filtering of a mean update: what lies in the noise's bulk is dropped."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kept = Literal["outside", "above"]


def edges(variance: float, ratio: float) -> tuple[float, float]:
    """σ² (1 ± 1/√q)², between which the eigenvalues of pure noise lie (Marchenko & Pastur, 1967).

    Args:
        variance: σ² of independent entries.
        ratio: q, rows per column.
    """
    return variance * (1 - ratio**-0.5) ** 2, variance * (1 + ratio**-0.5) ** 2


def published_shape(size: int, aspect: float) -> tuple[int, int]:
    """(rows, columns), rows the smallest divisor of `size` that is at least √(aspect · size)."""
    least = math.sqrt(aspect * size)
    divisors = {d for i in range(1, math.isqrt(size) + 1) if size % i == 0 for d in (i, size // i)}
    rows = min((d for d in divisors if d >= least), default=size)
    return rows, size // rows


def padded_shape(size: int, aspect: float) -> tuple[int, int]:
    """(rows, columns) that hold `size` numbers, columns = ⌊√(size / aspect)⌋."""
    columns = max(1, math.isqrt(int(size / aspect)))
    return -(-size // columns), columns


def filtered(flat: Tensor, *, variance: float, shape: tuple[int, int], keep: Kept) -> Tensor:
    """C U Uᵀ with C the vector row by row, U the eigenvectors of its columns' covariance kept.

    Args:
        flat: (n,) with n ≤ rows · columns; zeros fill the rest.
        variance: of the noise on every entry.
        shape: rows and columns of C.
        keep: eigenvalues "above" the bulk, or all "outside" of it.
    """
    rows, columns = shape
    matrix = torch.zeros(rows * columns, dtype=torch.float64, device=flat.device)
    matrix[: len(flat)] = flat.double()
    matrix = matrix.reshape(rows, columns)
    values, vectors = torch.linalg.eigh(torch.cov(matrix.T, correction=1).reshape(columns, -1))
    low, high = edges(variance, rows / columns)
    kept = values >= high
    if keep == "outside":
        kept |= values <= low
    basis = vectors[:, kept]
    kept_part: Tensor = matrix @ basis @ basis.T
    return kept_part.flatten()[: len(flat)].to(flat)
