"""Hub datasets through the optional `datasets` library; nothing here touches a network."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
from PIL import Image

from gradleak.data import hub, load
from gradleak.errors import CorruptFile, InvalidInput

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 10, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def datasets():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("datasets")


@pytest.fixture
def table(datasets):
    features = datasets.Features(
        id=datasets.Value("string"),
        picture=datasets.Image(),
        animal=datasets.ClassLabel(names=["cat", "dog"]),
    )
    rows = {
        "id": [str(i) for i in range(6)],
        "picture": [Image.fromarray(p) for p in PIXELS],
        "animal": [0, 1, 1, 0, 1, 0],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_dataset_saved_on_disk_is_read_exactly(tmp_path, table):
    table.save_to_disk(str(tmp_path / "pets"))
    data = load(f"hf:{tmp_path / 'pets'}")
    assert np.array_equal(data.images.numpy(), PIXELS.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 1, 1, 0, 1, 0]
    assert data.spec.class_names == ("cat", "dog")
    assert data.name == "hf:pets"


def test_splits_columns_and_size_are_fields(tmp_path, datasets, table):
    both = datasets.DatasetDict(train=table, test=table.select([4, 5]))
    both.save_to_disk(str(tmp_path / "pets"))
    data = load(f"hf:{tmp_path / 'pets'}:split=test,size=8,image=picture,label=animal")
    assert data.images.shape == (2, 3, 8, 8)
    assert data.labels.tolist() == [1, 0]
    with pytest.raises(InvalidInput, match="did you mean 'train'"):
        load(f"hf:{tmp_path / 'pets'}:split=trian")


def test_a_hub_identifier_is_passed_to_the_library(monkeypatch, datasets, table):
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("hf:someone/pets:split=test")
    assert asked == [("someone/pets", "test")]
    assert data.name == "hf:someone--pets"


def test_a_large_dataset_is_thinned(monkeypatch, datasets, table):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: table)
    monkeypatch.setattr(hub, "MOST", 4)
    assert len(load("hf:someone/pets")) == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("image=pictures", "did you mean 'picture'"),
        ("label=animals", "did you mean 'animal'"),
        ("colour=1", "no field 'colour'"),
        ("size=2", "4 to 1024"),
        ("image=id", "unreadable"),
        ("label=picture", "unreadable"),
    ],
)
def test_wrong_fields(monkeypatch, datasets, table, fields, words):
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *, split: table)
    with pytest.raises((InvalidInput, CorruptFile)) as caught:
        load(f"hf:someone/pets:{fields}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_without_pictures(monkeypatch, datasets, table):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *, split: table.remove_columns("picture")
    )
    with pytest.raises(InvalidInput, match=r"no Image column among id, animal"):
        load("hf:someone/pets")


def test_the_librarys_failures_are_one_line(monkeypatch, datasets):
    def load_dataset(name, *, split):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidInput, match=r"someone/pets.*no route") as caught:
        load("hf:someone/pets")
    assert "\n" not in str(caught.value)


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"gradleak\[data\]"):
        load("hf:someone/pets")
