"""A public random rotation that spreads a vector evenly over its coordinates, at any length."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gradleak.crypto.encoding import Reals
from gradleak.crypto.keys import stream


def block(length: int) -> int:
    """The largest power of two that is at most `length`: each coordinate is mixed with so many."""
    return 1 << (length.bit_length() - 1)


def rotate(vector: Reals, seed: bytes) -> Reals:
    """H D₂ on the last m coordinates after H D₁ on the first m, m = `block`; orthogonal.

    H is the Walsh–Hadamard matrix over √m, D are random signs. As 2m > d every coordinate comes
    out of a mixture of m, |y_j| > t‖x‖/√m with probability at most 2 e^(−t²/2), without the
    padding to a power of two.

    Args:
        vector: shape `(d,)`.
        seed: 32 public bytes.

    Source: Ailon and Chazelle 2006 (randomised Hadamard transform); the overlap is ours.
    """
    out, signs, m = vector.copy(), _signs(vector, seed), block(len(vector))
    for span, sign in zip(_spans(len(vector), m), signs, strict=False):
        out[span] = _hadamard(out[span] * sign)
    return out


def undo(vector: Reals, seed: bytes) -> Reals:
    """The inverse of `rotate`, which is its transpose."""
    out, signs, m = vector.copy(), _signs(vector, seed), block(len(vector))
    for span, sign in reversed(list(zip(_spans(len(vector), m), signs, strict=False))):
        out[span] = _hadamard(out[span]) * sign
    return out


def _spans(length: int, m: int) -> list[slice]:
    return [slice(0, m)] if length == m else [slice(0, m), slice(length - m, length)]


def _signs(vector: Reals, seed: bytes) -> NDArray[np.float64]:
    m = block(len(vector))
    bits = np.frombuffer(stream(seed, 2 * ((m + 7) // 8)), np.uint8).reshape(2, -1)
    return 1.0 - 2.0 * np.unpackbits(bits, axis=1)[:, :m].astype(np.float64)


def _hadamard(vector: Reals) -> Reals:
    """H v / √m by m log m additions; rows in bit-reversed order, where H is its inverse too."""
    m = len(vector)
    rows = vector.reshape(1, m)
    for _ in range(m.bit_length() - 1):
        first, second = np.hsplit(rows, 2)
        rows = np.concatenate([first + second, first - second])
    return rows.reshape(m) / math.sqrt(m)
