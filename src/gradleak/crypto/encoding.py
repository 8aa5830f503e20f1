"""Real vectors as bounded integers, and sums of them back."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gradleak.errors import InvalidInput

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

_PART = 2**14


class Encoding(Protocol):
    """How a client's vector becomes integers of at most `bound` in magnitude."""

    @property
    def bound(self) -> int:
        """Largest magnitude of an encoded entry."""
        ...

    def encode(self, vector: Reals) -> Integers:
        """Integers of one client's vector, drawn with the operating system's randomness."""
        ...

    def decode(self, total: Integers, *, clients: int) -> Reals:
        """The sum of the clients' vectors, from the sum of their integers."""
        ...


@dataclass(frozen=True)
class FixedPoint:
    """Clipping, then stochastic rounding to multiples of 2^−fraction.

        q = ⌊v⌋ + Bernoulli(v − ⌊v⌋),   v = clamp(x, ±clip)·2^fraction,   E q = v

    A multiple of the step is encoded exactly.

    Args:
        clip: largest magnitude that is kept, > 0; a multiple of the step.
        fraction: binary digits after the point, 0 to 52.

    Raises:
        InvalidInput: the bound is no integer from 1 to 2⁵², or a vector is not finite.
    """

    clip: float = 8.0
    fraction: int = 20

    def __post_init__(self) -> None:
        scaled = self.clip * 2.0**self.fraction
        if not 0 <= self.fraction <= 52 or not 1 <= scaled <= 2**52 or scaled != int(scaled):
            raise InvalidInput(
                f"clip={self.clip}, fraction={self.fraction}: expected clip·2^fraction to be an "
                "integer from 1 to 2^52"
            )

    @property
    def bound(self) -> int:
        """clip·2^fraction."""
        return int(self.clip * 2.0**self.fraction)

    def encode(self, vector: Reals) -> Integers:
        """Clip and round, by parts that stay in the cache."""
        whole = np.empty(len(vector), np.int64)
        draws = np.random.Generator(np.random.Philox(secrets.randbits(128)))
        for at in range(0, len(vector), _PART):
            part = vector[at : at + _PART]
            if not np.isfinite(part).all():
                raise InvalidInput("a vector with NaN or infinite entries cannot be summed")
            scaled = np.clip(part, -self.clip, self.clip) * 2.0**self.fraction
            down = np.floor(scaled)
            down += draws.random(len(part)) < scaled - down
            whole[at : at + _PART] = down
        return whole

    def decode(self, total: Integers, *, clients: int) -> Reals:
        """Scale back."""
        return total.astype(np.float64) * 2.0**-self.fraction


def fits(encoding: Encoding, *, clients: int, modulus: int) -> None:
    """Return if no sum of encoded vectors can wrap round: 2·n·bound < modulus.

    Raises:
        InvalidInput: it can.
    """
    if 2 * clients * encoding.bound >= modulus:
        most = (modulus - 1) // (2 * encoding.bound)
        raise InvalidInput(
            f"{clients} clients with entries up to {encoding.bound} overflow modulo {modulus}: "
            f"expected at most {most} clients, or fewer bits"
        )


def centred(total: NDArray[np.uint64], modulus: int) -> Integers:
    """Residues as the integers nearest to zero."""
    high = total > np.uint64((modulus - 1) // 2)
    wrapped = total.astype(np.int64)  # modulo 2⁶⁴ this is already the centred one
    if modulus < 2**64:
        wrapped = np.where(high, wrapped - np.int64(modulus), wrapped)
    return wrapped
