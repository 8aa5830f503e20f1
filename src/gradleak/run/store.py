"""The append-only store of a run: one JSON line per job, tensors beside it as safetensors.

    trials.jsonl            one record per (scenario, attack, defence, target group, seed)
    tensors/<key>.safetensors
    tensors/state-<key>.safetensors
    tensors/prior-<key>.safetensors
    engines.json            how attacks were vectorised, so that a resumed run does the same

Tensors reach their final name before the line that mentions them is appended, and a line reaches
the disk before the job counts as done: killing the process loses at most the jobs in flight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from gradleak import jsonsafe
from gradleak.errors import CorruptFile, InvalidInput

TRIALS = "trials.jsonl"
TENSORS = "tensors"


class Store:
    """Records by key, in a directory that one process at a time writes.

    Args:
        directory: made if missing.

    Raises:
        InvalidInput: the directory cannot be written, or another process is writing it.
        CorruptFile: a complete line of `trials.jsonl` is no record.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / TRIALS
        try:
            (directory / TENSORS).mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        except OSError as error:
            raise InvalidInput(
                f"cannot write to {str(directory)!r}: {error.strerror or error}"
            ) from None
        try:
            _lock(self._file.fileno(), directory)
            self.records, whole = read_trials(self._path)
            # A torn last line is what a kill leaves; its job runs again.
            self._file.truncate(whole)
            for orphan in (directory / TENSORS).glob("*.tmp"):
                orphan.unlink(missing_ok=True)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def append(self, record: Mapping[str, Any], *, tensors: bytes | None = None) -> None:
        """Add one record, and its tensors (a safetensors image) first.

        Raises:
            InvalidInput: the disk is full or the directory has gone.
        """
        try:
            if tensors is not None:
                write_whole(self.directory / record["tensors"], tensors)
            self._file.write(jsonsafe.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InvalidInput(
                f"cannot write to {str(self.directory)!r}: {error.strerror or error}"
            ) from None
        self.records[record["key"]] = dict(record)


def read_trials(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the records of `trials.jsonl` by key (the last of a key counts).

    Returns:
        The records, and the number of bytes that hold complete lines.

    Raises:
        CorruptFile: a complete line is no record.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}, 0
    whole = content.rfind(b"\n") + 1
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            record = jsonsafe.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError):
            raise CorruptFile(
                f"{str(path)!r}, line {number}: not a record of gradleak; "
                "remove the line, or choose another --out"
            ) from None
    return records, whole


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it is either absent, the old one or complete, whenever we are killed."""
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.tmp")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path: Path) -> Any:
    """Read one JSON file of a run.

    Raises:
        CorruptFile: it is missing, or not JSON.
    """
    try:
        return jsonsafe.loads(path.read_bytes())
    except OSError as error:
        raise CorruptFile(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except (ValueError, json.JSONDecodeError):
        raise CorruptFile(f"{str(path)!r} is not a JSON file written by gradleak") from None


def _lock(descriptor: int, directory: Path) -> None:
    """Refuse a second writer; the system drops the lock with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: the store works, a second writer goes unnoticed
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidInput(
            f"{str(directory)!r} is being written by another gradleak process; "
            "wait for it, or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        return
