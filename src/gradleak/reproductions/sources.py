"""The images that reproductions attack, and the halves they are cut into."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from gradleak.data import Dataset, Split
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.run import trial
from gradleak.run.trial import load_data

DATA: Mapping[str, str] = {"mnist": "mnist-5k", "cifar10": "digits"}
"""Data sets of papers, and the embedded ones that stand in where they are missing."""


def available(name: str, data_dir: str | None) -> tuple[str, Dataset]:
    """A data set, or what stands in for it where nobody said where it lies."""
    try:
        return name, load_data(name, data_dir)
    except CorruptFile:
        raise
    except InvalidInput:
        if data_dir is not None:
            raise
        return DATA[name], load_data(DATA[name], None)


def substituted(name: str) -> str:
    """What to add to a note where a data set stands in for another."""
    for wanted, instead in DATA.items():
        if name == instead:
            return f"; {instead} stands in for {wanted}, which is not on this machine"
    return ""


def current(cell: Mapping[str, Any], data_dir: str | None) -> Dataset:
    """The data that a cell was planned for.

    Raises:
        InvalidInput: they are others by now.
    """
    dataset = load_data(cell["data"], data_dir)
    if dataset.fingerprint != cell["fingerprint"]:
        raise InvalidInput(f"data {cell['data']!r} changed while the table was computed")
    return dataset


@lru_cache(maxsize=4)
def divide(dataset: Dataset, seed: int) -> Split:
    """The halves of an audit with this seed, once per process."""
    return trial.divide(dataset, seed)
