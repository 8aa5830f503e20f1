"""Messages changed on their way, field by field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.crypto.conformance.drive import bent, opened

Change = Callable[[Any], Mapping[str, object]]


def forged(raw: bytes, kind: type[Any], change: Change) -> bytes:
    """The same message with other fields."""
    return bent(raw, kind, **change(opened(raw, kind)))


def one(found: Mapping[int, bytes], value: Callable[[bytes], bytes]) -> dict[int, bytes]:
    """With the first entry changed."""
    key = next(iter(found))
    return {**found, key: value(found[key])}


def flipped(raw: bytes, at: int = -1) -> bytes:
    """With one bit changed."""
    changed = bytearray(raw)
    changed[at] ^= 1
    return bytes(changed)
