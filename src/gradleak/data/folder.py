"""A folder of pictures, one sub-folder per class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from gradleak.data.files import LARGEST, one_line
from gradleak.data.records import Dataset
from gradleak.errors import CorruptFile, InvalidInput

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SUFFIXES = frozenset(
    ".jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm".split()  # noqa: SIM905
)
LARGEST_SIDE = 1024
DEFAULT_SIDE = 32


def read_folder(directory: Path, *, size: int | None = None) -> Dataset:
    """Read a folder of pictures as squares of one size.

    Each sub-folder is a class; pictures that lie directly in the folder are one class (of two, see
    `Dataset.of`). Pictures are scaled until the shorter side is `size` and cropped at the centre.
    They are grey when every file is grey, else RGB. Hidden files and files that are no pictures by
    name are passed over.

    Args:
        directory: the folder.
        size: pixels of a side; by default the shortest side found, at most 32, because attacks
            on larger images take long.

    Raises:
        CorruptFile: a picture that cannot be decoded.
        InvalidInput: no pictures, pictures both beside and inside sub-folders, or an absurd size.
    """
    check_size(size, where=str(directory))
    files, labels, names = listing(directory)
    forms = [form(file) for file in files]
    channels = 1 if all(mode in ("L", "1", "LA") for mode, _ in forms) else 3
    side = size or min(DEFAULT_SIDE, min(shortest for _, shortest in forms))
    if len(files) * channels * side**2 > LARGEST:
        raise InvalidInput(
            f"{directory}: {len(files)} pictures of {side} x {side} exceed {LARGEST} bytes; "
            "choose a smaller size"
        )
    pixels = np.empty((len(files), channels, side, side), dtype=np.uint8)
    for row, file in zip(pixels, files, strict=True):
        with decoded(file) as picture:
            row[:] = square(picture, channels=channels, side=side, where=file)
    return Dataset.of(
        directory.resolve().name,
        torch.from_numpy(pixels),
        torch.tensor(labels),
        class_names=names,
    )


def check_size(size: int | None, *, where: str) -> None:
    """Refuse a side outside 4..1024 pixels."""
    if size is not None and not 4 <= size <= LARGEST_SIDE:
        raise InvalidInput(f"{where}: size {size}, expected 4 to {LARGEST_SIDE} pixels")


def listing(directory: Path) -> tuple[list[Path], list[int], list[str]]:
    """Return the picture files in a fixed order, their labels and the class names."""
    try:
        flat = pictures(directory)
        folders = sorted(
            f for f in directory.iterdir() if f.is_dir() and not f.name.startswith(".")
        )
        groups = {folder.name: found for folder in folders if (found := pictures(folder))}
    except OSError as error:
        raise InvalidInput(f"cannot read {directory}: {error.strerror or error}") from error
    if flat and groups:
        raise InvalidInput(
            f"{directory} has pictures both directly inside ({flat[0].name}) and in sub-folders "
            f"({next(iter(groups))}): expected one sub-folder per class, or no sub-folder"
        )
    if flat:
        groups = {directory.resolve().name: flat}
    if not groups:
        raise InvalidInput(
            f"{directory} has no pictures ({', '.join(sorted(SUFFIXES))}) directly inside or one "
            "sub-folder down"
        )
    files = [file for found in groups.values() for file in found]
    labels = [label for label, found in enumerate(groups.values()) for _ in found]
    return files, labels, list(groups)


def pictures(directory: Path) -> list[Path]:
    """Return the picture files directly inside a folder, sorted by name."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


@contextmanager
def decoded(file: Path) -> Iterator[Image.Image]:
    """Open a picture and translate whatever goes wrong while it is used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as picture:
                yield picture
    except InvalidInput:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise CorruptFile(f"{file} is not a readable picture: {one_line(error)}") from error


def form(file: Path) -> tuple[str, int]:
    """Return mode and shorter side of a picture from its header alone."""
    with decoded(file) as picture:
        return picture.mode, min(picture.size)


def square(
    picture: Image.Image, *, channels: int, side: int, where: object
) -> np.ndarray[Any, Any]:
    """Scale the shorter side to `side`, crop the centre; (channels, side, side) uint8.

    Raises:
        InvalidInput: more than 8 bits per channel, which Pillow would clip instead of scaling.
    """
    if picture.mode.startswith(("I", "F")):
        raise InvalidInput(
            f"{where} has more than 8 bits per channel (mode {picture.mode}): convert it to 8"
        )
    upright = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
    fitted = ImageOps.fit(upright, (side, side), method=Image.Resampling.LANCZOS)
    return np.asarray(fitted, dtype=np.uint8).reshape(side, side, channels).transpose(2, 0, 1)
