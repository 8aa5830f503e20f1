"""What every test shares: one computing thread, and the folder of real data sets if any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
torch.manual_seed(0)  # networks built while tests are collected
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

DATA_BESIDE_THE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "data"
if DATA_BESIDE_THE_CHECKOUT.is_dir():
    # setdefault: GRADLEAK_DATA= (empty) runs the tests as on a machine without real data.
    os.environ.setdefault("GRADLEAK_DATA", str(DATA_BESIDE_THE_CHECKOUT))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Networks that a test builds without a seed of their own are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gradleak_data() -> Path:
    """Folder of real data sets named by GRADLEAK_DATA; the test skips where there is none."""
    named = os.environ.get("GRADLEAK_DATA")
    if not named:
        pytest.skip("GRADLEAK_DATA is not set: no folder of real data sets")
    folder = Path(named)
    if not folder.is_dir():
        pytest.skip(f"GRADLEAK_DATA is {named!r}, which is not a folder")
    return folder
