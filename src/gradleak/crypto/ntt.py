"""The number-theoretic transform: Fourier's over a prime field, on the first axis.

    Xᵢ = Σⱼ xⱼ ω^(ij),   ω of order n, a power of two

Radix 2, decimation in time (Cooley and Tukey, 1965); all columns go at once.
"""

from __future__ import annotations

import numpy as np

from gradleak.crypto.field import Field, Residues
from gradleak.errors import InvalidInput

N31 = Field(2013265921)
"""15·2²⁷ + 1."""

N50 = Field(1125899865948161)
"""1073741785·2²⁰ + 1."""

_GENERATORS = {N31: 31, N50: 3}


def root(field: Field, size: int) -> int:
    """An element of order `size`.

    Raises:
        InvalidInput: the field has none, or the size is no power of two.
    """
    if size < 1 or size & (size - 1) or (field.modulus - 1) % size:
        raise InvalidInput(f"size={size}: expected a power of two that divides p - 1")
    return pow(_GENERATORS[field], (field.modulus - 1) // size, field.modulus)


def forward(field: Field, values: Residues) -> Residues:
    """The transform, shape `(n, ...)`."""
    return _transform(field, values, root(field, len(values)))


def backward(field: Field, values: Residues) -> Residues:
    """Its inverse."""
    size = len(values)
    found = _transform(field, values, pow(root(field, size), -1, field.modulus))
    return field.mul(found, pow(size, -1, field.modulus))


def _transform(field: Field, values: Residues, omega: int) -> Residues:
    size = len(values)
    x = values.reshape(size, -1)
    x = x[_bits_reversed(size)]
    half = 1
    while half < size:
        step = pow(omega, size // (2 * half), field.modulus)
        twiddles = field.powers(np.array([step], np.uint64), half).reshape(1, half, 1)
        pairs = x.reshape(-1, 2, half, x.shape[1])
        turned = field.mul(pairs[:, 1], twiddles) if half > 1 else pairs[:, 1]
        x = np.stack([field.add(pairs[:, 0], turned), field.sub(pairs[:, 0], turned)], axis=1)
        x = x.reshape(size, -1)
        half *= 2
    return x.reshape(values.shape)


def _bits_reversed(size: int) -> list[int]:
    order = [0]
    while len(order) < size:
        order = [2 * k for k in order] + [2 * k + 1 for k in order]
    return order
