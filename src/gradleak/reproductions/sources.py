"""The images that reproductions attack, and the halves they are cut into."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from gradleak import data
from gradleak.data import Dataset, Split
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.run.jobs import derive

DATA: Mapping[str, str] = {"mnist": "mnist-5k", "cifar10": "digits"}
"""Data sets of papers, and the embedded ones that stand in where they are missing."""


@lru_cache(maxsize=4)
def load(name: str, data_dir: str | None) -> Dataset:
    """Load a data set once per process."""
    return data.load(name, data_dir=Path(data_dir) if data_dir else None)


def available(name: str, data_dir: str | None) -> tuple[str, Dataset]:
    """A data set, or what stands in for it where nobody said where it lies."""
    try:
        return name, load(name, data_dir)
    except CorruptFile:
        raise
    except InvalidInput:
        if data_dir is not None:
            raise
        return DATA[name], load(DATA[name], None)


def substituted(name: str) -> str:
    """What to add to a note where a data set stands in for another."""
    for wanted, instead in DATA.items():
        if name == instead:
            return f"; {instead} stands in for {wanted}, which is not on this machine"
    return ""


@lru_cache(maxsize=4)
def divide(dataset: Dataset, seed: int) -> Split:
    """The private and public halves of a run."""
    return data.split(dataset, derive(seed, "split"))
