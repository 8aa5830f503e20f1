"""Messages changed on their way, field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from gradleak.crypto.protocol import Envelope
from gradleak.crypto.wire import decode, encode

Change = Callable[[Any], Mapping[str, object]]


def forged(raw: bytes, kind: type[Any], change: Change) -> bytes:
    """The same envelope around a message with other fields."""
    envelope = decode(Envelope, raw)
    message = decode(kind, envelope.body)
    return encode(
        dataclasses.replace(envelope, body=encode(dataclasses.replace(message, **change(message))))
    )


def one(found: Mapping[int, bytes], value: Callable[[bytes], bytes]) -> dict[int, bytes]:
    """With the first entry changed."""
    key = next(iter(found))
    return {**found, key: value(found[key])}


def flipped(raw: bytes, at: int = -1) -> bytes:
    """With one bit changed."""
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)
