"""Datasets: two embedded, the standard file formats, image folders, arrays and the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradleak.data.embedded import digits, mnist_5k
from gradleak.data.records import Dataset, Split, split
from gradleak.errors import InvalidInput, nearest

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


DATASETS: dict[str, DatasetAbout] = {
    about.id: about
    for about in (
        DatasetAbout("digits", "Handwritten digits", "CC BY 4.0", True, (1, 8, 8), 10),
        DatasetAbout("mnist-5k", "MNIST, 500 per digit", "CC BY-SA 3.0", True, (1, 28, 28), 10),
    )
}
EMBEDDED: dict[str, Callable[[], Dataset]] = {"digits": digits, "mnist-5k": mnist_5k}


def load(name_or_path: str, *, data_dir: Path | None = None) -> Dataset:
    """Load a dataset by name."""
    if name_or_path in EMBEDDED:
        return EMBEDDED[name_or_path]()
    raise InvalidInput(f"unknown data {name_or_path!r}: {nearest(name_or_path, DATASETS)}")
