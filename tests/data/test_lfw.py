"""Faces in the wild as folders of people."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gradleak.data import load
from gradleak.errors import InvalidInput


@pytest.mark.parametrize(
    ("name", "folder", "mode"),
    [("lfw", "lfw-subset", "L"), ("lfw-color", "lfw-color100", "RGB")],
)
def test_people_are_classes(tmp_path, name, folder, mode):
    levels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    for person in ("Ada", "Bob"):
        (tmp_path / "faces" / folder / person).mkdir(parents=True)
        for number in range(2):
            picture = Image.fromarray(levels).convert(mode)
            picture.save(tmp_path / "faces" / folder / person / f"{number}.png")
    data = load(name, data_dir=tmp_path)
    assert data.name == name
    assert data.spec.shape == (1 if mode == "L" else 3, 64, 64)
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.spec.class_names == ("Ada", "Bob")
    assert "research" in data.licence


def test_a_missing_folder_says_where_it_belongs(tmp_path, refused):
    with refused(InvalidInput, "faces/lfw-subset", "GRADLEAK_DATA"):
        load("lfw", data_dir=tmp_path)
