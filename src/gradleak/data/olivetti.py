"""The Olivetti faces in Roweis' MATLAB file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gradleak.data.files import find, one_line
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
    from scipy.io import loadmat, whosmat

    try:
        # Shapes first: the matrix is read only after its announced size was found sensible.
        entries = {name: (shape, kind) for name, shape, kind in whosmat(path)}
    except Exception as error:  # scipy raises many kinds for damaged files
        raise CorruptFile(f"{path} is not a readable MATLAB 5 file: {one_line(error)}") from error
    shape, kind = entries.get("faces", ((), "missing"))
    numeric = kind in ("uint8", "double", "single")
    if not numeric or len(shape) != 2 or shape[0] != 4096 or not 10 <= shape[1] <= 10_000:
        raise CorruptFile(
            f"{path}: 'faces' is {kind} {shape}, expected numbers (4096, 10 x people)"
        )
    try:
        faces = loadmat(path, variable_names=["faces"])["faces"]
        pixels = faces.astype(np.uint8)
        exact = np.array_equal(faces, pixels)
        images = pixels.T.reshape(-1, 1, 64, 64).transpose(0, 1, 3, 2)
    except Exception as error:
        raise CorruptFile(f"{path} is truncated or corrupted: {one_line(error)}") from error
    if not exact:
        raise CorruptFile(f"{path}: 'faces' holds values other than whole numbers 0..255")
    return Dataset.of(
        "olivetti",
        torch.from_numpy(images.copy()),
        torch.arange(len(images)) // 10,
        licence="AT&T Laboratories Cambridge: research use",
    )
