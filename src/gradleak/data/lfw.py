"""Faces of Labeled Faces in the Wild, as folders of pictures by person."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gradleak.data.folder import read_folder
from gradleak.data.records import Dataset
from gradleak.errors import InvalidInput

SIDE = 64
"""Pixels of a side that the pictures are scaled to."""


def lfw(directory: Path) -> Dataset:
    """Read grey faces from `directory`/faces/lfw-subset/PERSON/*.jpg."""
    return read_people(directory, ("faces/lfw-subset", "lfw-subset"), name="lfw")


def lfw_color(directory: Path) -> Dataset:
    """Read faces in colour from `directory`/faces/lfw-color100/PERSON/*.jpg."""
    return read_people(directory, ("faces/lfw-color100", "lfw-color100"), name="lfw-color")


def read_people(directory: Path, candidates: tuple[str, ...], *, name: str) -> Dataset:
    """Read the first of these folders that is there.

    Raises:
        InvalidInput: none is, or it holds no pictures.
        CorruptFile: a picture that cannot be decoded.
    """
    folder = next((directory / c for c in candidates if (directory / c).is_dir()), None)
    if folder is None:
        raise InvalidInput(
            f"data {name!r}: no folder {directory / candidates[0]}: put it there, or name another "
            "data directory with --data-dir or GRADLEAK_DATA"
        )
    found = read_folder(folder, size=SIDE)
    return dataclasses.replace(found, name=name, licence="University of Massachusetts: research")
