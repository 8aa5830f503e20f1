"""One numeric matrix of a MATLAB 5 file, read without trusting it.

SciPy's reader ends the process on some damaged files; a plain matrix needs little of the format.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradleak.data.files import opened, read_up_to
from gradleak.errors import CorruptFile

COMPRESSED, MATRIX = 15, 14
DTYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
NUMERIC_CLASSES = range(6, 14)
COMPLEX = 0x800
LARGEST = 2**29
"""Bytes of a file or of one decompressed element that are read at most."""


class Malformed(Exception):
    """The bytes are not a MATLAB 5 file; the message says in what way."""


def read_matrix(path: Path, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Read the real matrix called `name`.

    Raises:
        CorruptFile: not a little-endian MATLAB 5 file, damaged, or without such a matrix.
    """
    with opened(path) as stream:
        content = memoryview(read_up_to(stream, LARGEST))
    try:
        if len(content) < 128 or bytes(content[124:128]) != b"\x00\x01IM":
            raise Malformed("no such header")
        for kind, data in elements(content[128:]):
            if kind == COMPRESSED:
                kind, data = next(elements(inflated(data)), (0, data))
            found = matrix(data, name) if kind == MATRIX else None
            if found is not None:
                return found
    except (Malformed, zlib.error) as error:
        raise CorruptFile(f"{path} is no whole MATLAB 5 file: {error}") from error
    raise CorruptFile(f"{path} holds no matrix {name!r}")


def elements(content: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (kind, data) of each element: an 8-byte tag and its data, padded to 8 bytes."""
    position = 0
    while position < len(content):
        if position + 8 > len(content):
            raise Malformed("truncated")
        kind, size = struct.unpack_from("<II", content, position)
        start = position + 8
        if kind >> 16:  # a small element keeps up to 4 bytes of data inside its tag
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
            if size > 4:
                raise Malformed("a tag that is none")
        if start + size > len(content):
            raise Malformed("truncated")
        yield kind, content[start : start + size]
        position = start + size
        if kind != COMPRESSED:
            position += -position % 8


def inflated(data: memoryview) -> memoryview:
    """Decompress one element, at most `LARGEST` bytes of it."""
    stream = zlib.decompressobj()
    content = stream.decompress(data, LARGEST)
    if not stream.eof:
        raise Malformed("compressed data truncated or too large")
    return memoryview(content)


def matrix(data: memoryview, name: str) -> np.ndarray[Any, np.dtype[Any]] | None:
    """Return the matrix in an element's data if it has this name, else None."""
    parts = list(elements(data))
    if len(parts) < 3 or bytes(parts[2][1]) != name.encode():
        return None
    if len(parts) != 4 or len(parts[0][1]) != 8 or len(parts[1][1]) % 4:
        raise Malformed(f"{name!r} is no real matrix")
    (flags,) = struct.unpack_from("<I", parts[0][1])
    shape = struct.unpack(f"<{len(parts[1][1]) // 4}i", parts[1][1])
    kind, values = parts[3]
    if flags & 0xFF not in NUMERIC_CLASSES or flags & COMPLEX or kind not in DTYPES:
        raise Malformed(f"{name!r} is no real matrix")
    dtype = np.dtype(DTYPES[kind])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(values):
        raise Malformed(f"{name!r} has {len(values)} bytes, its shape {shape} needs others")
    return np.frombuffer(values, dtype=dtype).reshape(shape, order="F")
