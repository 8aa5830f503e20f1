"""CKKS as an exact additive cipher, from TenSEAL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np

from gradleak.crypto.encoding import Integers, Reals
from gradleak.crypto.homomorphic import Adder, Cipher, Homomorphic, promises
from gradleak.crypto.protocol import Terms
from gradleak.crypto.rejection import Reason, Rejected
from gradleak.crypto.sheet import Sheet
from gradleak.errors import InvalidInput

DEGREE = 4096
"""N; a ciphertext has N/2 slots."""

MODULI = (60, 49)
"""Bits of the primes, at most 109 together for 128-bit security (homomorphicencryption.org, 2018).
Ciphertexts are modulo the first alone; the second is there because TenSEAL insists on one."""

SIZE = 2 * DEGREE * 8
"""Bytes of a ciphertext's two polynomials; TenSEAL adds less than 1024."""

DEVIATION = 3.2 * DEGREE**0.5
"""Of a fresh ciphertext's noise in a slot, before division by the scale."""


def _scale(terms: Terms) -> float:
    """Δ: the largest power of two at which sums stay below a quarter of the modulus."""
    most = len(terms.clients) * terms.encoding.bound
    return 2.0 ** (MODULI[0] - 3 - most.bit_length())


def _context(scale: float) -> Any:
    """With a fresh secret key."""
    import tenseal

    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        DEGREE,
        coeff_mod_bit_sizes=list(MODULI),
        n_threads=1,
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.global_scale = scale
    return context


def _bytes(context: Any, *, secret: bool) -> bytes:
    raw: bytes = context.serialize(
        save_public_key=False,
        save_secret_key=secret,
        save_galois_keys=False,
        save_relin_keys=False,
    )
    return raw


@cache
def _parameters(scale: float) -> bytes:
    """A context without any key."""
    return _bytes(_context(scale), secret=False)


class _Adder:
    """Adds vectors under a context without keys."""

    def __init__(self, context: Any, scale: float) -> None:
        self.context, self._scale = context, scale

    def take(self, ciphertext: bytes) -> Any:
        import tenseal

        if not SIZE <= len(ciphertext) <= SIZE + 1024:
            raise Rejected(Reason.BAD_CIPHERTEXT, f"{len(ciphertext)} bytes: expected {SIZE}")
        try:
            found = tenseal.ckks_vector_from(self.context, ciphertext)
            parts = found.ciphertext()
        except (RuntimeError, ValueError, IndexError) as error:
            raise Rejected(Reason.BAD_CIPHERTEXT, str(error)) from error
        shape = [(c.size(), c.coeff_modulus_size(), c.is_ntt_form(), c.scale) for c in parts]
        if found.shape != [DEGREE // 2] or shape != [(2, 1, True, self._scale)]:
            raise Rejected(Reason.BAD_CIPHERTEXT, f"of shape {found.shape}, {shape}")
        return found

    def add(self, one: Any, other: Any) -> Any:
        one += other
        return one

    def give(self, ciphertext: Any) -> bytes:
        raw: bytes = ciphertext.serialize()
        return raw


class _Cipher:
    """Of a holder of the secret key."""

    def __init__(self, context: Any, terms: Terms) -> None:
        self._terms, self._adder = terms, _Adder(context, _scale(terms))

    def encrypt(self, values: Integers) -> bytes:
        import tenseal

        padded = np.zeros(DEGREE // 2)
        padded[: len(values)] = values
        raw: bytes = tenseal.ckks_vector(self._adder.context, padded.tolist()).serialize()
        return raw

    def decrypt(self, ciphertext: bytes, entries: int, clients: int) -> Integers:
        found: Reals = np.array(self._adder.take(ciphertext).decrypt())
        whole: Reals = np.rint(found)
        most = clients * self._terms.encoding.bound
        near = (np.abs(found - whole) <= 0.25).all() and (np.abs(whole) <= most).all()
        if not near or whole[entries:].any():
            raise Rejected(Reason.BAD_CIPHERTEXT, f"no sum of {clients} clients' integers")
        return whole[:entries].astype(np.int64)


@dataclass(frozen=True)
class Ckks(Homomorphic):
    """Aggregation under a CKKS key of the round, shared by its clients.

        c = Enc(Δ·q),   Dec(Σc) = Δ·Σq + e,   released: ⌊Dec(Σc)/Δ⌉ = Σq

    What is encrypted are the integers q of the terms' encoding (clipped there), at the largest
    scale Δ = 2^s that leaves the sum room in a 60-bit modulus. A quarter of a step is checked to
    be 14 standard deviations of the noise of n fresh ciphertexts, so the sum is exact.

    Decrypted CKKS values carry e, and who has them in full solves for the key from two ciphertexts
    (Li and Micciancio, EUROCRYPT 2021). Nobody here gets them: what clients release is rounded to
    integers, a function of the plaintexts alone, so that no noise need be added to hide e.

    One key for all clients means that a client and the server together open every upload. With a
    threshold key (each client holds a summand of it, and all or t of them decrypt a sum together)
    they could not; OpenFHE has it, TenSEAL has not.

    Raises:
        InvalidInput: sums too large for the modulus or the noise.

    Source: Cheon et al., ASIACRYPT 2017.
    """

    id: ClassVar[str] = "ckks"
    sheet: ClassVar[Sheet] = promises(
        title="CKKS",
        paper="Cheon et al., ASIACRYPT 2017",
        link="https://eprint.iacr.org/2016/421",
        cost=(
            "4 steps; 32 bytes for an entry in uploads and in the server's memory; a transform "
            "for every 2045 entries, no modular powers."
        ),
    )

    def check(self, terms: Terms) -> None:
        """Return if sums are exact.

        Raises:
            InvalidInput: they are not.
        """
        super().check(terms)
        clients = len(terms.clients)
        noise = 14 * DEVIATION * clients**0.5 / _scale(terms)
        if noise > 0.25:
            raise InvalidInput(
                f"{clients} clients with entries up to {terms.encoding.bound}: noise of "
                f"{noise:.2g} steps, expected at most 0.25: fewer bits or fewer clients"
            )

    def slots(self, terms: Terms) -> int:
        """N/2."""
        return DEGREE // 2

    def make(self, terms: Terms) -> tuple[bytes, bytes]:
        """A context with its secret key; there is no public part."""
        return _bytes(_context(_scale(terms)), secret=True), b""

    def cipher(self, terms: Terms, secret: bytes) -> Cipher:
        """Of a context with a secret key."""
        import tenseal

        try:
            if len(secret) > 2 * SIZE:
                raise ValueError(f"{len(secret)} bytes")
            context = tenseal.context_from(secret)
            public = _bytes(context, secret=False)
        except (RuntimeError, ValueError) as error:
            raise Rejected(Reason.INVALID_KEY, f"no CKKS context: {error}") from error
        if not context.has_secret_key() or public != _parameters(_scale(terms)):
            raise Rejected(Reason.INVALID_KEY, "a context without secret key or of other terms")
        return _Cipher(context, terms)

    def adder(self, terms: Terms, public: bytes) -> Adder:
        """The parameters, without any key."""
        import tenseal

        if public:
            raise Rejected(Reason.INVALID_KEY, f"{len(public)} bytes: expected none")
        scale = _scale(terms)
        return _Adder(tenseal.context_from(_parameters(scale)), scale)
