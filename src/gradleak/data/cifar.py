"""CIFAR-10 in its binary format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gradleak.data.files import find, opened, read_up_to
from gradleak.data.records import Dataset
from gradleak.errors import CorruptFile

OBJECTS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
RECORD = 1 + 3 * 32 * 32
LICENCE = "no formal licence: research use with citation"


def cifar10(directory: Path) -> Dataset:
    """Read CIFAR-10's training batches from `directory`/cifar10/data_batch_*.bin, also .bin.gz.

    Only the original lossless batches: files made from JPEG copies have other names and a dataset
    of their own, because compression would be taken for reconstruction error.
    """
    files = sorted((directory / "cifar10").glob("data_batch_*.bin"))
    files += sorted((directory / "cifar10").glob("data_batch_*.bin.gz"))
    if not files:
        find(directory, ("cifar10/data_batch_1.bin",), name="cifar10")
    return read_cifar(files, name="cifar10")


def cifar10_jpeg(directory: Path) -> Dataset:
    """Read 10,000 training images that were stored as JPEG: not pixel-exact, for training only."""
    file = find(
        directory,
        ("cifar10/jpeg_train_10000.bin.gz", "cifar10/jpeg_train_10000.bin"),
        name="cifar10-jpeg",
    )
    return read_cifar([file], name="cifar10-jpeg")


def read_cifar(files: list[Path], *, name: str) -> Dataset:
    """Read records of one label byte and 3072 pixel bytes (planes R, G, B, rows of 32)."""
    tables = []
    for file in files:
        with opened(file) as stream:
            content = read_up_to(stream, 60_000 * RECORD + 1)
        if not content or len(content) % RECORD or len(content) > 60_000 * RECORD:
            raise CorruptFile(
                f"{file} is truncated or no CIFAR-10 binary file: {len(content)} bytes, expected "
                f"1 to 60000 records of {RECORD}"
            )
        table = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)
        if table[:, 0].max() > 9:
            raise CorruptFile(
                f"{file} is no CIFAR-10 binary file: label {table[:, 0].max()}, expected 0 to 9"
            )
        tables.append(table)
    records = np.concatenate(tables)
    return Dataset.of(
        name,
        torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()),
        torch.from_numpy(records[:, 0].astype(np.int64)),
        licence=LICENCE,
        class_names=OBJECTS,
    )
