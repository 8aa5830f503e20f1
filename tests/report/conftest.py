"""Rendered reports that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradleak.report.html import render
from tests.report import synthetic


@pytest.fixture(scope="session")
def typical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick audit: every verdict and state, grey, batch 1."""
    directory = tmp_path_factory.mktemp("typical") / "out"
    synthetic.write(directory, synthetic.TYPICAL)
    return render(directory)


@pytest.fixture(scope="session")
def broad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 findings over three stages and batches of 1 and 4, in colour."""
    directory = tmp_path_factory.mktemp("broad") / "out"
    synthetic.write(directory, synthetic.MANY, channels=3, targets=3)
    return render(directory)
