"""Datasets: two embedded, the standard file formats, image folders, arrays and the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradleak.data.arrays import pneumoniamnist, read_npz
from gradleak.data.cifar import cifar10, cifar10_jpeg
from gradleak.data.embedded import digits, mnist_5k
from gradleak.data.files import data_directory
from gradleak.data.folder import read_folder
from gradleak.data.hub import read_hub
from gradleak.data.idx import fashion_mnist, mnist
from gradleak.data.lfw import lfw, lfw_color
from gradleak.data.olivetti import olivetti
from gradleak.data.records import Dataset, Split, split
from gradleak.errors import InvalidInput, nearest
from gradleak.registry import convert, split_spec

__all__ = ["DATASETS", "Dataset", "DatasetAbout", "Split", "load", "split"]


@dataclass(frozen=True, slots=True)
class DatasetAbout:
    """What a reader needs to know about a dataset with a name."""

    id: str
    title: str
    licence: str
    embedded: bool
    shape: tuple[int, int, int]
    classes: int


RESEARCH = "research use"
DATASETS: dict[str, DatasetAbout] = {
    about.id: about
    for about in (
        DatasetAbout("digits", "Handwritten digits", "CC BY 4.0", True, (1, 8, 8), 10),
        DatasetAbout("mnist-5k", "MNIST, 500 per digit", "CC BY-SA 3.0", True, (1, 28, 28), 10),
        DatasetAbout("mnist", "MNIST", "CC BY-SA 3.0", False, (1, 28, 28), 10),
        DatasetAbout("fashion-mnist", "Fashion-MNIST", "MIT", False, (1, 28, 28), 10),
        DatasetAbout("cifar10", "CIFAR-10, lossless", RESEARCH, False, (3, 32, 32), 10),
        DatasetAbout("cifar10-jpeg", "CIFAR-10 from JPEG", RESEARCH, False, (3, 32, 32), 10),
        DatasetAbout("olivetti", "Olivetti faces", RESEARCH, False, (1, 64, 64), 40),
        DatasetAbout("lfw", "Faces in the wild, grey", RESEARCH, False, (1, 64, 64), 50),
        DatasetAbout("lfw-color", "Faces in the wild", RESEARCH, False, (3, 64, 64), 12),
        DatasetAbout("pneumoniamnist", "Chest X-rays", "CC BY 4.0", False, (1, 28, 28), 2),
    )
}
EMBEDDED: dict[str, Callable[[], Dataset]] = {"digits": digits, "mnist-5k": mnist_5k}
READERS: dict[str, Callable[[Path], Dataset]] = {
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar10-jpeg": cifar10_jpeg,
    "olivetti": olivetti,
    "lfw": lfw,
    "lfw-color": lfw_color,
    "pneumoniamnist": pneumoniamnist,
}


def load(name_or_path: str | os.PathLike[str], *, data_dir: Path | None = None) -> Dataset:
    """Load a dataset by name, path or hub identifier.

    Args:
        name_or_path: a key of `DATASETS`; a folder of pictures, optionally `FOLDER:size=48`; an
            .npz file; or `hf:DATASET`, optionally `hf:DATASET:split=test,size=64`.
        data_dir: where named datasets lie; by default $GRADLEAK_DATA, else the user's cache.

    Raises:
        InvalidInput: unknown name, no such file, or contents that are no labelled images.
        CorruptFile: a file is truncated, corrupted or of another format.
    """
    text = os.fspath(name_or_path)
    if text in ("", "hf:"):
        raise InvalidInput(f"data {text!r}: expected a name, a path or hf:DATASET")
    if text.startswith("hf:"):
        name, fields = with_fields(text[3:])
        kinds = {"split": str, "image": str, "label": str, "size": int}
        return read_hub(name, **options(fields, kinds, where=text))
    if text in EMBEDDED:
        return EMBEDDED[text]()
    if text in READERS:
        return READERS[text](data_directory(data_dir))
    path = Path(text).expanduser()
    fields = {}
    if not path.exists():
        name, fields = with_fields(text)
        path = Path(name).expanduser()
        if name in DATASETS:
            raise InvalidInput(f"data {text!r}: {name!r} has no fields")
    if path.is_dir():
        return read_folder(path, **options(fields, {"size": int}, where=text))
    if path.is_file():
        options(fields, {}, where=text)
        if path.suffix.lower() != ".npz":
            raise InvalidInput(f"data {text!r}: expected a folder of pictures or an .npz file")
        return read_npz(path)
    if path.suffix or len(path.parts) != 1:
        raise InvalidInput(f"data {text!r}: no such file or folder")
    raise InvalidInput(
        f"unknown data {text!r}: {nearest(text, DATASETS)} (also a folder of pictures, an .npz "
        "file or hf:DATASET)"
    )


def with_fields(text: str) -> tuple[str, dict[str, str]]:
    """Split "NAME:field=value,..." at its last colon, where fields follow it."""
    name, colon, rest = text.rpartition(":")
    return (name, split_spec(f":{rest}")[1]) if colon and "=" in rest else (text, {})


def options(fields: Mapping[str, str], kinds: Mapping[str, type], *, where: str) -> dict[str, Any]:
    """Convert fields to their kinds and name the nearest field for one that is unknown."""
    for key in fields:
        if key not in kinds:
            raise InvalidInput(f"data {where!r} has no field {key!r}: {nearest(key, kinds)}")
    return {
        k: convert(v, kinds[k], where=f"data {where!r}, field {k!r}") for k, v in fields.items()
    }
