"""Arrays of images and labels in an .npz file."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy

from gradleak.data.files import LARGEST, find, one_line
from gradleak.data.records import Dataset
from gradleak.errors import CorruptFile, InvalidInput

PAIRS = (
    ("images", "labels"),
    ("train_images", "train_labels"),
    ("x_train", "y_train"),
    ("x", "y"),
    ("data", "labels"),
)
"""Names of image and label arrays that are recognised, first come first served."""

Array = np.ndarray[Any, np.dtype[Any]]


def pneumoniamnist(directory: Path) -> Dataset:
    """Read PneumoniaMNIST's training images from `directory`/medical/pneumoniamnist.npz."""
    path = find(
        directory, ("medical/pneumoniamnist.npz", "pneumoniamnist.npz"), name="pneumoniamnist"
    )
    return read_npz(
        path,
        name="pneumoniamnist",
        licence="CC BY 4.0, MedMNIST v2",
        class_names=("normal", "pneumonia"),
    )


def read_npz(
    path: Path,
    *,
    name: str | None = None,
    licence: str = "unstated",
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Read images and labels whose names are one of `PAIRS`.

    Images are (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), whole numbers in 0..255 or
    floating point in [0, 1]; labels are (N,) or (N, 1) whole numbers from 0.

    Raises:
        CorruptFile: not a zip archive, damaged, or with arrays that need a pickle.
        InvalidInput: no such arrays, or shapes and values that are no images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            pair = next((p for p in PAIRS if set(p) <= members.keys()), None)
            if pair is None:
                raise InvalidInput(
                    f"{path} holds {', '.join(sorted(members)[:8]) or 'nothing'}: expected arrays "
                    f"{' or '.join('/'.join(p) for p in PAIRS)}"
                )
            images, labels = (read_member(archive, members[key], path=path) for key in pair)
    except InvalidInput:
        raise
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise CorruptFile(f"{path} is not a whole .npz file: {one_line(error)}") from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InvalidInput(
            f"{path}: labels are {labels.dtype} {labels.shape}, expected (N,) whole numbers"
        )
    return Dataset.of(
        name or path.stem,
        torch.from_numpy(channels_first(images, path=path)),
        torch.from_numpy(labels.astype(np.int64)),
        licence=licence,
        class_names=class_names,
    )


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, *, path: Path) -> Array:
    """Read one array after checking that its header needs no pickle and tells its true size."""
    where = f"{path}, array {member.filename.removesuffix('.npy')!r}"
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(stream)
        if dtype.hasobject:
            raise CorruptFile(f"{where} holds Python objects (a pickle), which are never read")
        size = math.prod(shape) * dtype.itemsize
        stored = member.file_size - stream.tell()
        if size != stored or size > LARGEST:
            raise CorruptFile(
                f"{where} announces {size} bytes and stores {stored}: expected equal numbers, at "
                f"most {LARGEST}"
            )
    with archive.open(member) as stream:
        return npy.read_array(stream, allow_pickle=False)


def channels_first(images: Array, *, path: Path) -> Array:
    """Return (N, C, H, W) images, uint8 or float32, from one of the usual layouts."""
    found = f"{path}: images are {images.dtype} {images.shape}"
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InvalidInput(f"{found}, expected (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)")
    if images.dtype.kind in "iu":
        if images.size and not 0 <= images.min() <= images.max() <= 255:
            raise InvalidInput(f"{found}, values {images.min()} to {images.max()}, expected 0..255")
        return np.ascontiguousarray(images, dtype=np.uint8)
    if images.dtype.kind == "f":
        return np.ascontiguousarray(images, dtype=np.float32)
    raise InvalidInput(f"{found}, expected whole or floating-point numbers")
