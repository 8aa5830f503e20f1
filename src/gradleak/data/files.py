"""Where data files lie, and how their bytes are read without trusting their headers."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from gradleak.errors import CorruptFile, InvalidInput

LARGEST = 2**32
"""Bytes of images that are read at most; a larger announcement is an error, not an allocation."""


def data_directory(chosen: Path | None) -> Path:
    """Return the directory chosen, else $GRADLEAK_DATA, else the user's cache."""
    if chosen is not None:
        return Path(chosen).expanduser()
    if from_environment := os.environ.get("GRADLEAK_DATA"):
        return Path(from_environment).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gradleak"


def find(directory: Path, candidates: Sequence[str], *, name: str) -> Path:
    """Return the first of `candidates` (relative paths) that is a file in `directory`.

    Raises:
        InvalidInput: none is there; says where each dataset's files belong.
    """
    for candidate in candidates:
        if (directory / candidate).is_file():
            return directory / candidate
    raise InvalidInput(
        f"data {name!r}: no file {directory / candidates[0]}: put it there, or name another data "
        "directory with --data-dir or GRADLEAK_DATA"
    )


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressing it when it starts like gzip, and translate every read error."""
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if compressed:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield cast(IO[bytes], stream)
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptFile(f"{path} is truncated or corrupted: {error}") from error
    except FileNotFoundError as error:
        raise InvalidInput(f"no file {path}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error


def read_up_to(stream: IO[bytes], size: int) -> bytearray:
    """Read at most `size` bytes, growing with what is really there."""
    content = bytearray()
    while len(content) < size and (part := stream.read(min(size - len(content), 2**20))):
        content += part
    return content


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 160 characters, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
