"""MNIST and Fashion-MNIST in their IDX format."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradleak.data.files import LARGEST, find, opened, read_up_to
from gradleak.data.records import Dataset
from gradleak.errors import CorruptFile

GARMENTS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def mnist(directory: Path) -> Dataset:
    """Read MNIST's 60,000 training images from `directory`/mnist."""
    images, labels = idx_pair(directory, "mnist")
    return Dataset.of("mnist", images, labels, licence="CC BY-SA 3.0", classes=10)


def fashion_mnist(directory: Path) -> Dataset:
    """Read Fashion-MNIST's 60,000 training images from `directory`/fashion-mnist."""
    images, labels = idx_pair(directory, "fashion-mnist")
    return Dataset.of("fashion-mnist", images, labels, licence="MIT", class_names=GARMENTS)


def idx_pair(directory: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read the training images (N, 1, H, W) and labels (N,) of `directory`/`name`."""
    stems = f"{name}/train-images-idx3-ubyte", f"{name}/train-labels-idx1-ubyte"
    image_file, label_file = (find(directory, (f"{s}.gz", s), name=name) for s in stems)
    images, labels = read_idx(image_file, axes=3), read_idx(label_file, axes=1)
    if len(images) != len(labels):
        raise CorruptFile(
            f"{image_file} holds {len(images)} images but {label_file} {len(labels)} labels"
        )
    return images.unsqueeze(1), labels.to(torch.int64)


def read_idx(path: Path, *, axes: int) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzip-compressed.

    The format is 0, 0, 8 (unsigned byte), the number of axes, each side as a big-endian 32-bit
    number, then the values. Memory grows with the bytes present, not with the sides announced.

    Raises:
        CorruptFile: of another format, shorter or longer than its header announces, or absurd.
    """
    with opened(path) as stream:
        header = stream.read(4 + 4 * axes)
        if header[:4] != bytes((0, 0, 8, axes)):
            raise CorruptFile(
                f"{path} is not an IDX file of {axes} axes of bytes: it starts with "
                f"{header[:4].hex(' ') or 'nothing'}, expected 00 00 08 {axes:02x}"
            )
        if len(header) < 4 + 4 * axes:
            raise CorruptFile(f"{path} is truncated inside its header")
        sides = struct.unpack(f">{axes}I", header[4:])
        size = math.prod(sides)
        if not 0 < size <= LARGEST:
            raise CorruptFile(
                f"{path} announces {' x '.join(map(str, sides))} bytes: expected 1 to {LARGEST}"
            )
        values = read_up_to(stream, size)
        if len(values) < size:
            raise CorruptFile(f"{path} is truncated: {len(values)} of {size} values are there")
        if stream.read(1):
            raise CorruptFile(f"{path} is longer than its header announces ({size} values)")
    return torch.from_numpy(np.frombuffer(values, dtype=np.uint8).reshape(sides))
