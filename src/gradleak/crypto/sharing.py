"""Shamir's sharing of a short secret among numbered holders."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np

from gradleak.crypto import keys
from gradleak.crypto.field import M61, Residues
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.errors import InvalidInput

SECRET = 32
"""Bytes of a secret that is split."""

_LIMB, _LIMBS = 7, 5
_SHARE = struct.Struct(f"<{1 + _LIMBS}Q")


def split(secret: bytes, threshold: int, numbers: Iterable[int]) -> dict[int, bytes]:
    """Shares of 32 bytes, any `threshold` of which make it, and fewer tell nothing.

        secretₗ = fₗ(0),   shareₗ(v) = fₗ(v + 1),   fₗ of degree threshold − 1 modulo 2⁶¹ − 1

    with limbs l of seven bytes and coefficients from the operating system (Shamir, 1979). A share
    is 48 bytes: its point v + 1, then the values.

    Raises:
        InvalidInput: the secret is of another length, or there are fewer holders than needed.
    """
    holders = tuple(numbers)
    if len(secret) != SECRET:
        raise InvalidInput(f"secret of {len(secret)} bytes: expected {SECRET}")
    if not 1 <= threshold <= len(set(holders)) == len(holders):
        raise InvalidInput(
            f"threshold={threshold}: expected 1 to {len(set(holders))}, the distinct holders"
        )
    padded = secret.ljust(_LIMB * _LIMBS, b"\0")
    limbs = [padded[at : at + _LIMB] for at in range(0, len(padded), _LIMB)]
    coefficients = M61.uniform(keys.fresh(), threshold * _LIMBS).reshape(threshold, _LIMBS)
    coefficients[0] = [int.from_bytes(limb, "little") for limb in limbs]
    values = M61.matmul(_powers(holders, threshold), coefficients)
    return {v: _SHARE.pack(v + 1, *row) for v, row in zip(holders, values.tolist(), strict=True)}


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from the first `threshold` shares by holder.

    Shares that do not belong together make values above seven bytes except with probability 2⁻⁴⁹;
    a holder who computes one on purpose is not found.

    Raises:
        Aborted: there are fewer.
        Rejected: BAD_SHARE: of another length, holder or secret.
    """
    if len(shares) < threshold:
        raise Aborted(f"{len(shares)} shares: expected at least {threshold}")
    holders = tuple(sorted(shares)[:threshold])
    if any(len(shares[v]) != _SHARE.size for v in holders):
        raise Rejected(Reason.BAD_SHARE, f"expected {_SHARE.size} bytes from every holder")
    words = np.frombuffer(b"".join(shares[v] for v in holders), "<u8").reshape(threshold, -1)
    points, values = words[:, 0], words[:, 1:]
    if (points != np.array(holders) + 1).any() or (values >= M61.modulus).any():
        raise Rejected(Reason.BAD_SHARE, f"of points {points - 1}: expected {holders}'s")
    limbs = M61.matmul(_at_zero(holders)[None], values)[0]
    if (limbs >> np.uint64(8 * _LIMB)).any():
        raise Rejected(Reason.BAD_SHARE, "shares that do not belong together")
    padded = b"".join(int(limb).to_bytes(_LIMB, "little") for limb in limbs)
    if any(padded[SECRET:]):
        raise Rejected(Reason.BAD_SHARE, "shares that do not belong together")
    return padded[:SECRET]


@lru_cache(maxsize=64)
def _powers(holders: tuple[int, ...], threshold: int) -> Residues:
    return M61.powers(M61.residues([v + 1 for v in holders]), threshold)


@lru_cache(maxsize=64)
def _at_zero(holders: tuple[int, ...]) -> Residues:
    """Lagrange's coefficients of f(0): Πⱼ xⱼ / (xⱼ − xᵢ) over j ≠ i."""
    points = M61.residues([v + 1 for v in holders])
    apart = M61.sub(points[:, None], points)
    np.fill_diagonal(apart, points)
    return M61.mul(M61.product(points), M61.inverse(M61.product(apart)))
