"""Ramp sharing of long vectors: T holders learn nothing, any U of N recover, d/(U − T) words each.

A vector is cut into U − T blocks, T random ones are added, and the U are encoded as N shares by a
code of which any U rows are invertible (MDS), and any T rows of whose random columns, too. All is
linear: the sum of shares is the share of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gradleak.crypto import keys, ntt
from gradleak.crypto.encoding import fits
from gradleak.crypto.field import Field, Residues
from gradleak.crypto.protocol import Terms
from gradleak.crypto.rejection import Aborted
from gradleak.errors import InvalidInput

_COLUMNS = 4096


@dataclass(frozen=True)
class Sizes:
    """Of a ramp scheme.

    Args:
        holders: N.
        private: T, so many learn nothing.
        needed: U, so many recover.
    """

    holders: int
    private: int
    needed: int

    @property
    def blocks(self) -> int:
        """U − T."""
        return self.needed - self.private

    def width(self, length: int) -> int:
        """Words of a share of a vector."""
        return -(-length // self.blocks)


def sizes(holders: int, privacy: float, dropouts: float) -> Sizes:
    """Sizes for T colluding and D dropped holders, each a count, or below 1 a fraction of N.

    Raises:
        InvalidInput: T < 1, or T + D ≥ N.
    """
    for name, value in {"privacy": privacy, "dropouts": dropouts}.items():
        if not value >= 0 or (value >= 1 and value != int(value)):
            raise InvalidInput(f"{name}={value}: expected a fraction below 1, or a count")
    private, dropped = (
        int(value) if value >= 1 else math.floor(value * holders + 1e-9)
        for value in (privacy, dropouts)
    )
    if private < 1 or private + dropped >= holders:
        raise InvalidInput(
            f"privacy={privacy}, dropouts={dropouts}: {private} colluding and {dropped} dropped "
            f"of {holders} clients: expected at least 1 colluding, together fewer than clients"
        )
    return Sizes(holders, private, holders - dropped)


def field_for(terms: Terms, *fields: Field) -> Field:
    """The first field in which no sum of the clients' integers wraps round.

    Raises:
        InvalidInput: not even in the last.
    """
    for field in fields[:-1]:
        if 2 * len(terms.clients) * terms.encoding.bound < field.modulus:
            return field
    fits(terms.encoding, clients=len(terms.clients), modulus=fields[-1].modulus)
    return fields[-1]


@dataclass(frozen=True, eq=False)
class Code:
    """A linear code from U blocks, the T random ones last, to N shares.

    Args:
        field: of the words.
        sizes: N, T, U.
        points: of the holders; a share is a polynomial's value there, degree below U.
        spread: the encoding of blocks, shape (U, width), as shares, shape (N, width).
        solved: U holders' points to the matrix that makes the U − T blocks of their shares.
    """

    field: Field
    sizes: Sizes
    points: Residues
    spread: Callable[[Residues], Residues]
    solved: Callable[[Residues], Residues]

    def share(self, vector: Residues) -> Residues:
        """Everybody's shares, shape (N, width); blocks are padded with zeros."""
        width, at = self.sizes.width(len(vector)), len(vector)
        blocks = np.empty(self.sizes.needed * width, np.uint64)
        blocks[:at] = vector
        blocks[at : self.sizes.blocks * width] = 0
        hidden = self.sizes.private * width
        blocks[-hidden:] = self.field.uniform(keys.fresh(), hidden)
        return self.spread(blocks.reshape(-1, width))

    def recover(self, shares: Mapping[int, Residues], length: int) -> Residues:
        """The vector of shares by holder's place, from the first U of them.

        What more there are must agree: a wrong share among more than U is found by a random
        combination of the words, with probability 1 − 1/p.

        Raises:
            Aborted: fewer than U, or they contradict one another.
        """
        needed, places = self.sizes.needed, sorted(shares)
        if len(places) < needed:
            raise Aborted(f"{len(places)} shares: expected at least {needed}")
        values = np.stack([shares[place] for place in places])
        points = self.points[places]
        if len(places) > needed:
            weights = self.field.uniform(keys.fresh(), values.shape[1])
            folded = self.field.matmul(values, weights[:, None])
            others = lagrange(self.field, points[:needed], points[needed:])
            if (self.field.matmul(others, folded[:needed]) != folded[needed:]).any():
                raise Aborted(f"{len(places)} shares that contradict one another")
        blocks = self.field.matmul(self.solved(points[:needed]), values[:needed])
        return blocks.reshape(-1)[:length]


@lru_cache(maxsize=4)
def lagrange_code(field: Field, sizes: Sizes) -> Code:
    """Blocks are a polynomial's values at 0, …, U − 1, shares those at U, …, U + N − 1.

    Disjoint points make every square part of the generator a Cauchy matrix but for scales, hence
    invertible: Lagrange coded computing (Yu et al., 2019).
    """
    inner = field.residues(range(sizes.needed))
    outer = field.residues(range(sizes.needed, sizes.needed + sizes.holders))
    generator = lagrange(field, inner, outer)
    return Code(
        field,
        sizes,
        outer,
        lambda blocks: field.matmul(generator, blocks),
        lambda points: lagrange(field, points, inner[: sizes.blocks]),
    )


@lru_cache(maxsize=4)
def spectral_code(field: Field, sizes: Sizes) -> Code:
    """Blocks are a polynomial's coefficients, shares its values at ω⁰, …, ω^(N−1), by the NTT.

    The random blocks are T neighbouring coefficients: any T rows of theirs are Vandermonde's,
    scaled, hence invertible. ω is of order n, the least power of two ≥ N.
    """
    size = 1 << (sizes.holders - 1).bit_length()
    omega = np.array([ntt.root(field, size)], np.uint64)

    def spread(blocks: Residues) -> Residues:
        shares = np.empty((sizes.holders, blocks.shape[1]), np.uint64)
        for at in range(0, blocks.shape[1], _COLUMNS):
            here = np.s_[:, at : at + _COLUMNS]
            padded = np.zeros((size, len(blocks[0, at : at + _COLUMNS])), np.uint64)
            padded[: len(blocks)] = blocks[here]
            shares[here] = ntt.forward(field, padded)[: sizes.holders]
        return shares

    return Code(
        field,
        sizes,
        field.powers(omega, sizes.holders)[0],
        spread,
        lambda points: interpolation(field, points)[: sizes.blocks],
    )


def lagrange(field: Field, points: Residues, at: Residues) -> Residues:
    """Matrix from values at distinct points to values at others, shape (len(at), len(points)).

    ℓₖ(y) = Πⱼ(y − xⱼ) / ((y − xₖ) Πⱼ≠ₖ(xₖ − xⱼ))
    """
    apart = field.sub(at[:, None], points)
    whole = field.product(apart.T)
    return field.mul(whole[:, None], field.inverse(field.mul(apart, _slopes(field, points))))


def interpolation(field: Field, points: Residues) -> Residues:
    """Vandermonde's inverse: values at distinct points to the polynomial's coefficients.

    Column i holds Πⱼ≠ᵢ(x − xⱼ), divided out of the product of all by Horner's rule, over its
    value at xᵢ.
    """
    whole, zero = np.ones(1, np.uint64), np.zeros(1, np.uint64)
    for point in points:  # Π(x − xⱼ), lowest coefficient first
        raised, level = np.concatenate([zero, whole]), np.concatenate([whole, zero])
        whole = field.sub(raised, field.mul(level, point))
    rest = np.ones((len(points), len(points)), np.uint64)  # by place, then point
    for k in range(len(points) - 2, -1, -1):
        rest[k] = field.add(whole[k + 1], field.mul(points, rest[k + 1]))
    return field.mul(rest, field.inverse(_slopes(field, points)))


def _slopes(field: Field, points: Residues) -> Residues:
    """Πⱼ≠ₖ(xₖ − xⱼ)."""
    apart = field.sub(points[:, None], points)
    np.fill_diagonal(apart, 1)
    return field.product(apart.T)
