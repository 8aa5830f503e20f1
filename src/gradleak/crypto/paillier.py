"""Paillier encryption with many integers to a ciphertext."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import numpy as np

from gradleak.crypto.encoding import Integers
from gradleak.crypto.homomorphic import Adder, Cipher, Homomorphic, promises
from gradleak.crypto.protocol import Terms
from gradleak.crypto.rejection import Reason, Rejected
from gradleak.crypto.sheet import Sheet
from gradleak.errors import InvalidInput


def _width(terms: Terms) -> int:
    """Bits of a slot: those of 2·bound, and log₂(clients) guard bits."""
    return (2 * len(terms.clients) * terms.encoding.bound).bit_length()


class _Adder:
    """Enc(x)·Enc(y) = Enc(x + y) modulo n²."""

    def __init__(self, n: int, size: int) -> None:
        import gmpy2

        self._size, self._square = size, gmpy2.mpz(n) ** 2
        self._n = n

    def take(self, ciphertext: bytes) -> Any:
        if len(ciphertext) != self._size:
            raise Rejected(Reason.BAD_CIPHERTEXT, f"{len(ciphertext)} bytes: expected {self._size}")
        found = int.from_bytes(ciphertext, "little")
        if not 0 < found < self._square or gcd(found, self._n) != 1:
            raise Rejected(Reason.BAD_CIPHERTEXT, "no unit modulo n²")
        return found

    def add(self, one: Any, other: Any) -> Any:
        return one * other % self._square

    def give(self, ciphertext: Any) -> bytes:
        return int(ciphertext).to_bytes(self._size, "little")


class _Cipher:
    """Of a holder of p and q.

        Enc(m) = (1 + m·n)·ρ mod n²,   ρ uniform among the n-th powers

    ρ needs no power modulo n²: the n-th powers modulo p² are the p-th powers of 1, …, p − 1, each
    once (they depend on h modulo p only, and x ↦ x^q permutes them), likewise for q².
    """

    def __init__(self, p: int, q: int, size: int, terms: Terms) -> None:
        import gmpy2
        import phe

        self._gmpy2, self._terms, self._adder = gmpy2, terms, _Adder(p * q, size)
        self._key = phe.PaillierPrivateKey(phe.PaillierPublicKey(p * q), p, q)
        self._primes = [(p, gmpy2.mpz(p) ** 2), (q, gmpy2.mpz(q) ** 2)]
        self._inverse = gmpy2.invert(self._primes[0][1], self._primes[1][1])

    def power(self) -> Any:
        """ρ."""
        (one, square), (other, other_square) = (
            (self._gmpy2.powmod(1 + secrets.randbelow(p - 1), p, square), square)
            for p, square in self._primes
        )
        return one + square * ((other - one) * self._inverse % other_square)

    def encrypt(self, values: Integers) -> bytes:
        offset = values + np.int64(self._terms.encoding.bound)
        plain = self._gmpy2.pack(offset.tolist(), _width(self._terms))
        n = self._key.public_key.n
        return self._adder.give(self._adder.add(1 + plain * n, self.power()))

    def decrypt(self, ciphertext: bytes, entries: int, clients: int) -> Integers:
        plain = self._key.raw_decrypt(self._adder.take(ciphertext))
        digits = self._gmpy2.unpack(self._gmpy2.mpz(plain), _width(self._terms))
        most = 2 * clients * self._terms.encoding.bound
        if len(digits) > entries or max(digits, default=0) > most:
            raise Rejected(Reason.BAD_CIPHERTEXT, f"no sum of {clients} clients' entries")
        digits += [0] * (entries - len(digits))
        return np.array(digits, np.int64) - np.int64(most // 2)


@dataclass(frozen=True)
class Paillier(Homomorphic):
    """Aggregation under a Paillier key of the round, shared by its clients.

        Enc(x)·Enc(y) = Enc(x + y) mod n²,   packed: m = Σ_k (x_k + bound)·2^(k·width)

    A slot holds the sum of all clients' entries, so that none runs into the next; what is encrypted
    are raw integers: there is no exponent in the clear. Encryption and decryption use the primes
    (the Chinese remainder theorem); encryption is as random as with the public key alone.

    Args:
        bits: length of n, even: 2048 (112-bit security) or more; 3072 is for 128.
        unsafe_small_keys: for tests only: allows keys that can be factored.

    Raises:
        InvalidInput: the key is short.

    Source: Paillier, EUROCRYPT 1999; packing: Zhang et al. (BatchCrypt), USENIX ATC 2020.
    """

    bits: int = 2048
    unsafe_small_keys: bool = False

    id: ClassVar[str] = "paillier"
    sheet: ClassVar[Sheet] = promises(
        title="Paillier with packing",
        paper="Paillier, EUROCRYPT 1999; Zhang et al. (BatchCrypt), USENIX ATC 2020",
        link="https://www.usenix.org/conference/atc20/presentation/zhang-chengliang",
        cost=(
            "4 steps; one ciphertext of 2·bits for some 70 entries at 2048 bits; a modular power "
            "each for client and opener, a product for the server."
        ),
    )

    def __post_init__(self) -> None:
        least = 64 if self.unsafe_small_keys else 2048
        if self.bits < least or self.bits % 16:
            raise InvalidInput(f"bits={self.bits}: expected a multiple of 16, at least {least}")

    def slots(self, terms: Terms) -> int:
        """⌊(bits − 1)/width⌋."""
        return (self.bits - 1) // _width(terms)

    def make(self, terms: Terms) -> tuple[bytes, bytes]:
        """Primes, and n."""
        import phe

        public, private = phe.generate_paillier_keypair(n_length=self.bits)
        half = self.bits // 16
        primes = [p.to_bytes(half, "little") for p in (private.p, private.q)]
        return b"".join(primes), public.n.to_bytes(2 * half, "little")

    def cipher(self, terms: Terms, secret: bytes) -> Cipher:
        """Of two primes."""
        import gmpy2

        half = self.bits // 16
        p, q = (int.from_bytes(part, "little") for part in (secret[:half], secret[half:]))
        good = gmpy2.is_prime(p) and gmpy2.is_prime(q) and p != q
        if len(secret) != 2 * half or not good or (p * q).bit_length() != self.bits:
            raise Rejected(Reason.INVALID_KEY, f"no two primes of an n of {self.bits} bits")
        return _Cipher(p, q, self.bits // 4, terms)

    def adder(self, terms: Terms, public: bytes) -> Adder:
        """Modulo n²."""
        n = int.from_bytes(public, "little")
        if len(public) != self.bits // 8 or n.bit_length() != self.bits or n % 2 == 0:
            raise Rejected(Reason.INVALID_KEY, f"n of {n.bit_length()} bits: expected {self.bits}")
        return _Adder(n, self.bits // 4)
