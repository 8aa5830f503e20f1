"""Keys, sealed letters and masks, from `cryptography`; secrets from the operating system."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from gradleak.crypto.rejection import Reason, Rejected

SEED = 32
"""Bytes of a seed, of a key and of a public key."""


def fresh(size: int = SEED) -> bytes:
    """Random bytes of the operating system."""
    return os.urandom(size)


def public_key(secret: bytes) -> bytes:
    """The X25519 public key of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agreed(secret: bytes, public: bytes, *, purpose: bytes) -> bytes:
    """The 32-byte key that two parties share: HKDF-SHA256 of X25519, bound to a purpose.

    The purpose should name protocol, session and use, so that no key serves twice.

    Raises:
        Rejected: INVALID_KEY: of another length, or a point of small order.
    """
    return agreed_each(secret, [public], purpose=purpose)[0]


def agreed_each(secret: bytes, publics: Iterable[bytes], *, purpose: bytes) -> list[bytes]:
    """The same with many parties, for half the time: one's own key is prepared once."""
    own, found = X25519PrivateKey.from_private_bytes(secret), []
    for public in publics:
        try:
            shared = own.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise Rejected(
                Reason.INVALID_KEY, f"public key of {len(public)} bytes: {error}"
            ) from error
        found.append(HKDF(hashes.SHA256(), SEED, salt=None, info=purpose).derive(shared))
    return found


def seal(key: bytes, letter: bytes, *, context: bytes) -> bytes:
    """A letter encrypted and authenticated by ChaCha20-Poly1305, with a fresh nonce before it.

    Args:
        context: authenticated, not sent: who writes to whom in which session.
    """
    nonce = os.urandom(12)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, letter, context)


def unseal(key: bytes, sealed: bytes, *, context: bytes) -> bytes:
    """The letter.

    Raises:
        Rejected: NOT_AUTHENTIC: changed, truncated, or of another key or context.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:12], sealed[12:], context)
    except (InvalidTag, ValueError) as error:
        raise Rejected(Reason.NOT_AUTHENTIC, "a letter that its key does not open") from error


def stream(seed: bytes, size: int) -> bytearray:
    """Pseudorandom bytes: ChaCha20's key stream from a 32-byte seed that serves this once."""
    out = bytearray(size)
    cipher: Any = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    cipher.update_into(out, out)
    return out


def words32(seed: bytes, count: int) -> NDArray[np.uint32]:
    """Uniform numbers modulo 2³²."""
    return np.frombuffer(stream(seed, 4 * count), dtype="<u4")


def words64(seed: bytes, count: int) -> NDArray[np.uint64]:
    """Uniform numbers modulo 2⁶⁴."""
    return np.frombuffer(stream(seed, 8 * count), dtype="<u8")


def signing_key() -> bytes:
    """A fresh Ed25519 secret."""
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )


def verifying_key(secret: bytes) -> bytes:
    """The public half of a signing key, as a public-key infrastructure hands it out."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def sign(secret: bytes, statement: bytes) -> bytes:
    """An Ed25519 signature, 64 bytes."""
    return Ed25519PrivateKey.from_private_bytes(secret).sign(statement)


def verify(public: bytes, signature: bytes, statement: bytes) -> None:
    """Return if the signature is right.

    Raises:
        Rejected: BAD_SIGNATURE.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement)
    except (InvalidSignature, ValueError) as error:
        raise Rejected(Reason.BAD_SIGNATURE, "a signature that its key does not verify") from error
