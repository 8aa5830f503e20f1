"""Distributed differential privacy: every client adds a share of the noise, as integers.

Clip, rotate, scale, round, add integer noise; the protocol below sums. Nobody sees one client's
noisy vector: the server sees a sum with the noise of all, as if a trusted curator had added it.
What that proves is accounted in `gradleak.metrics.distributed_epsilon`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from gradleak.crypto import discrete
from gradleak.crypto.encoding import Integers, Reals
from gradleak.crypto.keys import fresh, words64
from gradleak.crypto.protocol import Aggregation, Party, Server, Terms, Vector
from gradleak.crypto.rotation import block, rotate, undo
from gradleak.crypto.sheet import Sheet
from gradleak.errors import InvalidInput

Noise = Literal["skellam", "discrete-gaussian"]

_FAILURE_BITS = 40


@dataclass(frozen=True)
class DistributedNoise:
    """A client's clipped vector on an integer grid, with its share of the noise.

        q = ⌊s·R·clip(x)⌉ + noise,   noise of variance (z·c·s)² / (n − tolerated) per coordinate

    with c the clipping norm, R a rotation, ⌊·⌉ stochastic rounding, repeated until ‖q‖² ≤ `norm2`
    before the noise. That bound is checked on integers and the noise is exact, so that no rounding
    error of floating point touches what is proved.

    The scale s is the largest for which sums fit in `bits` bits.

    Args:
        clients: n.
        length: d.
        clip: c, largest Euclidean norm of a client's vector that is kept.
        multiplier: z, the noise's standard deviation on the sum over c when as many drop out as
            are tolerated.
        noise: "skellam", whose sums are Skellam again, or "discrete-gaussian", whose are nearly.
        tolerated: clients that may drop out, or collude, before the noise is less than z·c.
        bits: of a coordinate of the sum, sign included; 8 to 28.
        rotation: 32 public bytes, drawn independently of the vectors; None for no rotation.

    Raises:
        InvalidInput: one makes no sense, or a client's noise has less than ½ on the grid.

    Source: Kairouz, Liu and Steinke 2021, algorithm 1 and theorem 1; Agarwal, Kairouz
    and Liu 2021 (Skellam).
    """

    clients: int
    length: int
    clip: float = 1.0
    multiplier: float = 1.0
    noise: Noise = "skellam"
    tolerated: int = 0
    bits: int = 24
    rotation: bytes | None = None

    def __post_init__(self) -> None:
        if self.clients < 1 or self.length < 1:
            raise InvalidInput(
                f"clients={self.clients}, length={self.length}: expected at least 1 of each"
            )
        if not 0 <= self.tolerated < self.clients:
            raise InvalidInput(f"tolerated={self.tolerated}: expected 0 to {self.clients - 1}")
        if not 8 <= self.bits <= 28:
            raise InvalidInput(f"bits={self.bits}: expected 8 to 28")
        for name in ("clip", "multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInput(f"{name}={getattr(self, name)}: expected a positive number")
        if self.rotation is not None and len(self.rotation) != 32:
            raise InvalidInput(f"rotation of {len(self.rotation)} bytes: expected 32")
        if self.scale <= 0 or self.variance < 0.25:
            raise InvalidInput(
                f"bits={self.bits}: expected more for {self.clients} clients and "
                f"multiplier={self.multiplier}, whose noise is lost on so coarse a grid"
            )

    @property
    def _tail(self) -> float:
        """ln(2/p): 3nd events, entries, sums and rotated coordinates, have 2⁻⁴⁰ between them."""
        return math.log(2.0) * (_FAILURE_BITS + 1) + math.log(3 * self.clients * self.length)

    @property
    def _reach(self) -> float:
        """Largest coordinate of a clipped vector, after a rotation with probability 1 − p."""
        if self.rotation is None:
            return self.clip
        return self.clip * min(1.0, math.sqrt(2 * self._tail / block(self.length)))

    @property
    def _share(self) -> float:
        """Standard deviation of a client's noise before scaling."""
        return self.multiplier * self.clip / math.sqrt(self.clients - self.tolerated)

    @property
    def scale(self) -> float:
        """s, grid points per unit: the largest for which `total` is sure to be below 2^(bits−1)."""
        room = (1 << (self.bits - 1)) - 1 - self.clients - 2 * self._tail / 3
        whole = self.clients * self._reach
        return room / (whole + math.sqrt(2 * self._tail * self.clients) * self._share)

    @property
    def bound(self) -> int:
        """Largest magnitude of a client's entry: certain before the noise, but for the rotation.

            s·reach + 1 + L/3 + √(L²/9 + 2Lσ²),   L = ln(2/p)

        With the noise, and the rotation's draw, some entry of some client, or some coordinate of
        the sum, is beyond `bound` or `total` with probability at most 2⁻⁴⁰ (Bernstein for the
        noise, Hoeffding for the rotation, over all n·d). Then a sum may wrap round, which makes it
        wrong, and no less private.
        """
        return math.floor(self.scale * self._reach + 1 + self._noise(self.variance))

    @property
    def total(self) -> int:
        """Largest magnitude of a coordinate of the sum, likewise; noise adds up as its root."""
        values = self.clients * (self.scale * self._reach + 1)
        return math.floor(values + self._noise(self.clients * self.variance))

    def _noise(self, variance: float) -> float:
        third = self._tail / 3
        return third + math.sqrt(third**2 + 2 * self._tail * variance)

    @property
    def variance(self) -> float:
        """σ² of a client's noise, on the grid."""
        return (self._share * self.scale) ** 2

    @property
    def norm2(self) -> int:
        """Largest ‖q‖² before the noise: s²c² + d/4 + √(2 ln 1/β)·(sc + √d/2), with β = e^−½."""
        norm = self.scale * self.clip
        return math.floor(norm**2 + self.length / 4 + norm + math.sqrt(self.length) / 2)

    def encode(self, vector: Reals) -> Integers:
        """Clip, rotate, scale, round and add noise."""
        if vector.shape != (self.length,) or not np.isfinite(vector).all():
            raise InvalidInput(f"vector of shape {vector.shape}: expected {self.length} numbers")
        draw = discrete.skellam if self.noise == "skellam" else discrete.discrete_gaussian
        return self.rounded(vector) + draw(self.variance, self.length)

    def rounded(self, vector: Reals) -> Integers:
        """Everything but the noise: for tests and tables, never to be sent."""
        largest = float(np.abs(vector).max()) or 1.0
        norm = largest * float(np.linalg.norm(vector / largest))
        scaled = vector * min(1.0, self.clip / norm if norm else 1.0)
        if self.rotation is not None:
            scaled = rotate(scaled, self.rotation)
        scaled = scaled * self.scale
        down = np.floor(scaled)
        part, floor = scaled - down, down.astype(np.int64)
        while True:
            draws = (words64(fresh(), self.length) >> np.uint64(11)).astype(np.float64) * 2.0**-53
            found = floor + (draws < part)
            if int(found @ found) <= self.norm2:
                return found

    def decode(self, total: Integers, *, clients: int) -> Reals:
        """Scale and rotate back."""
        values = total.astype(np.float64) / self.scale
        return values if self.rotation is None else undo(values, self.rotation)


@dataclass(frozen=True)
class DistributedDP:
    """Another protocol, whose clients add noise: differential privacy without a trusted curator.

    The inner protocol's own threshold should be at least clients − tolerated: it alone stops a sum
    with less noise from being opened.

    Args:
        inner: the protocol that sums, with fields after ":" separated by ";".
        noise, clip, multiplier, bits: as for `DistributedNoise`.
        dropouts: share of the clients that may drop out, or collude, before the noise is less than
            multiplier·clip; rounded up.
        rotate: by a rotation that the session's name seeds.
    """

    id: ClassVar[str] = "distributed-dp"
    sheet: ClassVar[Sheet] = Sheet(
        title="Distributed differential privacy",
        paper="Kairouz, Liu, Steinke 2021; Agarwal, Kairouz, Liu 2021 (Skellam)",
        link="https://arxiv.org/abs/2102.06387",
        trusts="as the inner protocol; and that clients who do not drop out add their noise",
        survives="as the inner protocol; with more dropouts than told, ε grows",
        leaks="the noisy sum, of which (ε, δ) holds for every client; who took part",
        cost="no message more than the inner protocol; noise for every coordinate at each client",
    )

    inner: str = "secagg-plus"
    noise: Noise = "skellam"
    multiplier: float = 1.0
    clip: float = 1.0
    dropouts: float = 0.0
    bits: int = 24
    rotate: bool = True

    @property
    def helpers(self) -> int:
        return self._aggregation.helpers

    @cached_property
    def _aggregation(self) -> Aggregation:
        from gradleak.crypto import build

        inner = build(self.inner.replace(";", ","))
        if isinstance(inner, DistributedDP):
            raise InvalidInput("inner=distributed-dp: expected a protocol without noise")
        return inner

    def noisy(self, terms: Terms) -> Terms:
        """The terms with this noise as their encoding."""
        clients = len(terms.clients)
        encoding = DistributedNoise(
            clients,
            terms.length,
            clip=self.clip,
            multiplier=self.multiplier,
            noise=self.noise,
            tolerated=math.ceil(self.dropouts * clients),
            bits=self.bits,
            rotation=hashlib.sha256(b"rotation" + terms.session).digest() if self.rotate else None,
        )
        return dataclasses.replace(terms, encoding=encoding)

    def check(self, terms: Terms) -> None:
        self._aggregation.check(self.noisy(terms))

    def server(self, terms: Terms) -> Server:
        return self._aggregation.server(self.noisy(terms))

    def party(self, terms: Terms, number: int, vector: Vector | None = None) -> Party:
        return self._aggregation.party(self.noisy(terms), number, vector)
