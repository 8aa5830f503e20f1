"""Datasets of the Hugging Face hub, read by the optional `datasets` library."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradleak.data.files import LARGEST, one_line
from gradleak.data.folder import DEFAULT_SIDE, check_size, square
from gradleak.data.records import Dataset
from gradleak.errors import CorruptFile, InvalidInput, nearest

MOST = 60_000
"""Examples taken from a larger dataset: a random choice with a fixed seed."""


def read_hub(
    name: str,
    *,
    split: str = "train",
    image: str | None = None,
    label: str | None = None,
    size: int | None = None,
) -> Dataset:
    """Read a hub dataset, or one saved on disk by the `datasets` library.

    Args:
        name: hub identifier such as "ylecun/mnist", or a folder written by `save_to_disk`.
        split: which split.
        image: column of pictures; by default the first whose feature is an image.
        label: column of labels; by default the first whose feature is a class label.
        size: pixels of a side after scaling and centre-cropping; by default the shorter side of
            the first picture, at most 32.

    Raises:
        InvalidInput: `datasets` is not installed, there is no such dataset, split or column.
        CorruptFile: a picture that cannot be decoded.
    """
    check_size(size, where=f"hf:{name}")
    if importlib.util.find_spec("datasets") is None:
        raise InvalidInput(f"hf:{name} needs the 'datasets' package: pip install 'gradleak[data]'")
    table = open_table(name, split=split)
    features = table.features
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    image = column_of(name, kinds, image, kind="Image")
    label = column_of(name, kinds, label, kind="ClassLabel")
    if len(table) == 0:
        raise InvalidInput(f"hf:{name}, split {split!r} is empty")
    if len(table) > MOST:
        table = table.shuffle(seed=0).select(range(MOST))
    names = tuple(getattr(features[label], "names", None) or ())
    try:
        first = table[0][image]
        channels = 1 if first.mode in ("L", "1", "LA") else 3
        side = size or min(DEFAULT_SIDE, *first.size)
        if len(table) * channels * side**2 > LARGEST:
            raise InvalidInput(f"hf:{name} exceeds {LARGEST} bytes: choose a smaller size")
        pixels = np.empty((len(table), channels, side, side), dtype=np.uint8)
        labels = torch.empty(len(table), dtype=torch.int64)
        for index, row in enumerate(table):
            pixels[index] = square(
                row[image], channels=channels, side=side, where=f"hf:{name}, row {index}"
            )
            labels[index] = int(row[label])
    except InvalidInput:
        raise
    except Exception as error:  # whatever the decoder raises for a bad row
        raise CorruptFile(f"hf:{name} has an unreadable example: {one_line(error)}") from error
    licence = getattr(table.info, "license", "") or "see the dataset's card"
    short = Path(name).name if Path(name).is_dir() else name.replace("/", "--")
    return Dataset.of(
        f"hf:{short}", torch.from_numpy(pixels), labels, licence=licence, class_names=names
    )


def open_table(name: str, *, split: str) -> Any:
    """Open one split, from disk when `name` is a folder."""
    import datasets

    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, split=split)
        opened = datasets.load_from_disk(name)
    except Exception as error:  # the library raises many kinds: network, names, formats
        raise InvalidInput(
            f"hf:{name}, split {split!r} cannot be loaded: {type(error).__name__}: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(opened, datasets.DatasetDict):
        return opened
    if split not in opened:
        raise InvalidInput(f"hf:{name} has no split {split!r}: {nearest(split, opened)}")
    return opened[split]


def column_of(name: str, kinds: dict[str, str], chosen: str | None, *, kind: str) -> str:
    """Return the chosen column, or the first whose feature is of `kind`."""
    if chosen is not None:
        if chosen not in kinds:
            raise InvalidInput(f"hf:{name} has no column {chosen!r}: {nearest(chosen, kinds)}")
        return chosen
    for column, found in kinds.items():
        if found == kind:
            return column
    field = "image" if kind == "Image" else "label"
    raise InvalidInput(
        f"hf:{name} has no {kind} column among {', '.join(kinds)}: name it, hf:{name}:{field}=..."
    )
