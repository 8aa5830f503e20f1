"""The Olivetti faces in Roweis' MATLAB file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gradleak.data.files import find
from gradleak.data.matlab import read_matrix
from gradleak.data.records import Dataset
from gradleak.errors import CorruptFile


def olivetti(directory: Path) -> Dataset:
    """Read 64×64 faces, ten of each person, from `directory`/faces/olivettifaces.mat."""
    candidates = ("faces/olivettifaces.mat", "olivetti/olivettifaces.mat", "olivettifaces.mat")
    return read_olivetti(find(directory, candidates, name="olivetti"))


def read_olivetti(path: Path) -> Dataset:
    """Read `faces`, a matrix (4096, 10·people) of 0..255 whose columns are images by columns.

    Raises:
        CorruptFile: not a MATLAB 5 file with such a matrix.
    """
    faces = read_matrix(path, "faces")
    if faces.ndim != 2 or faces.shape[0] != 4096 or faces.shape[1] < 10:
        raise CorruptFile(f"{path}: 'faces' is {faces.shape}, expected (4096, 10 x people)")
    if not np.isin(faces, np.arange(256)).all():
        raise CorruptFile(f"{path}: 'faces' holds values other than whole numbers 0..255")
    images = faces.T.astype(np.uint8).reshape(-1, 1, 64, 64).transpose(0, 1, 3, 2)
    return Dataset.of(
        "olivetti",
        torch.from_numpy(images.copy()),
        torch.arange(len(images)) // 10,
        licence="AT&T Laboratories Cambridge: research use",
    )
