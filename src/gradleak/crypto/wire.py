"""Typed messages as bytes: strict, canonical, and no pickle.

A message is a frozen dataclass whose fields are `int` (below 2⁶⁴), `bytes`, `Words` (a vector of
uint64 or uint32), `tuple[int, ...]`, `dict[int, bytes]` or `dict[int, Words]`. Each has one
encoding only: sorted keys, lengths before contents, little-endian. What clients keep between steps
is written in the same way.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

import numpy as np
from numpy.typing import NDArray

from gradleak.crypto.rejection import Reason, Rejected

Words = NDArray[np.uint64] | NDArray[np.uint32]
Raw = bytes | memoryview
T = TypeVar("T")

_COUNT = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_WIDTHS: Mapping[int, Any] = {4: np.dtype("<u4"), 8: np.dtype("<u8")}


def encode(message: object) -> bytes:
    """A message's fields as bytes, in their order.

    Raises:
        TypeError: it is no dataclass, or a field is of a type that has no encoding.
    """
    return b"".join(pieces(message))


def pieces(message: object) -> Iterator[Raw]:
    """What `encode` puts together; vectors are not copied.

    Raises:
        TypeError: as `encode`.
    """
    for name, (write, _) in _codecs(cast(Any, type(message))).items():
        yield from write(getattr(message, name))


def decode(kind: type[T], raw: Raw) -> T:
    """The message that bytes hold; vectors are read-only views of them.

    Raises:
        Rejected: TRUNCATED, TRAILING_BYTES or MALFORMED (keys out of order, unknown word width).
    """
    found, rest = decode_head(kind, raw)
    if rest:
        raise Rejected(Reason.TRAILING_BYTES, f"{len(rest)} bytes after a {kind.__name__}")
    return found


def decode_head(kind: type[T], raw: Raw) -> tuple[T, memoryview]:
    """The message that bytes begin with, and what follows it.

    Raises:
        Rejected: TRUNCATED or MALFORMED.
    """
    cursor = _Cursor(memoryview(raw))
    fields = {name: read(cursor) for name, (_, read) in _codecs(cast(Any, kind)).items()}
    try:
        return kind(**fields), cursor.take(cursor.left)
    except ValueError as error:
        raise Rejected(Reason.MALFORMED, str(error)) from error


class _Cursor:
    def __init__(self, raw: memoryview) -> None:
        self._raw, self._at = raw, 0

    @property
    def left(self) -> int:
        return len(self._raw) - self._at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise Rejected(Reason.TRUNCATED, f"{self.left} bytes left, expected {size}")
        self._at += size
        return self._raw[self._at - size : self._at]

    def count(self) -> int:
        return int(_COUNT.unpack(self.take(4))[0])


Codec = tuple[Callable[[Any], list[Raw]], Callable[[_Cursor], Any]]


@cache
def _codecs(kind: Any) -> dict[str, Codec]:
    hints = get_type_hints(kind)
    return {field.name: _codec(hints[field.name]) for field in dataclasses.fields(kind)}


def _codec(hint: Any) -> Codec:
    for known, codec in _CODECS:
        if hint == known:
            return codec
    raise TypeError(f"{hint}: no encoding")


def _write_bytes(value: bytes) -> list[Raw]:
    return [_COUNT.pack(len(value)), value]


def _read_bytes(cursor: _Cursor) -> bytes:
    return bytes(cursor.take(cursor.count()))


def _write_words(value: Words) -> list[Raw]:
    width = value.dtype.itemsize
    little = np.ascontiguousarray(value, dtype=_WIDTHS[width])
    return [bytes((width,)), _COUNT.pack(len(value)), little.view(np.uint8).data]


def _read_words(cursor: _Cursor) -> Words:
    width = cursor.take(1)[0]
    if width not in _WIDTHS:
        raise Rejected(Reason.MALFORMED, f"words of {width} bytes: expected 4 or 8")
    return np.frombuffer(cursor.take(cursor.count() * width), dtype=_WIDTHS[width])


def _write_numbers(value: tuple[int, ...]) -> list[Raw]:
    return [_COUNT.pack(len(value)), struct.pack(f"<{len(value)}Q", *value)]


def _read_numbers(cursor: _Cursor) -> tuple[int, ...]:
    count = cursor.count()
    return struct.unpack(f"<{count}Q", cursor.take(8 * count))


def _write_by_number(item: Codec) -> Callable[[Mapping[int, Any]], list[Raw]]:
    def write(value: Mapping[int, Any]) -> list[Raw]:
        written: list[Raw] = [_COUNT.pack(len(value))]
        for key in sorted(value):
            written += [_NUMBER.pack(key), *item[0](value[key])]
        return written

    return write


def _read_by_number(item: Codec) -> Callable[[_Cursor], dict[int, Any]]:
    def read(cursor: _Cursor) -> dict[int, Any]:
        found: dict[int, Any] = {}
        last = -1
        for _ in range(cursor.count()):
            key = int(_NUMBER.unpack(cursor.take(8))[0])
            if key <= last:
                raise Rejected(Reason.MALFORMED, f"key {key} after {last}: expected a larger one")
            found[key], last = item[1](cursor), key
        return found

    return read


_INT: Codec = (lambda v: [_NUMBER.pack(v)], lambda c: int(_NUMBER.unpack(c.take(8))[0]))
_BYTES: Codec = (_write_bytes, _read_bytes)
_WORDS: Codec = (_write_words, _read_words)
_CODECS: tuple[tuple[Any, Codec], ...] = (
    (int, _INT),
    (bytes, _BYTES),
    (Words, _WORDS),
    (tuple[int, ...], (_write_numbers, _read_numbers)),
    (dict[int, bytes], (_write_by_number(_BYTES), _read_by_number(_BYTES))),
    (dict[int, Words], (_write_by_number(_WORDS), _read_by_number(_WORDS))),
)
