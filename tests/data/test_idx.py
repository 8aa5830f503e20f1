"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from gradleak.data import load
from gradleak.data.idx import read_idx
from gradleak.errors import CorruptFile, InvalidInput

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    return header + values.tobytes()


def write_pair(folder: Path, *, images: bytes, labels: bytes, suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(images)
    (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(labels)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_and_labels_come_back_exactly(tmp_path, name, suffix):
    pack = gzip.compress if suffix else bytes
    write_pair(tmp_path / name, images=pack(idx(IMAGES)), labels=pack(idx(LABELS)), suffix=suffix)
    data = load(name, data_dir=tmp_path)
    assert torch.equal(data.images, torch.from_numpy(IMAGES)[:, None])
    assert data.labels.tolist() == LABELS.tolist()
    assert data.spec.shape == (1, 28, 28)
    assert data.spec.classes == 10
    assert data.name == name


def test_the_environment_names_the_data_directory(tmp_path, monkeypatch):
    write_pair(tmp_path / "mnist", images=idx(IMAGES), labels=idx(LABELS))
    monkeypatch.setenv("GRADLEAK_DATA", str(tmp_path))
    assert len(load("mnist")) == 6


def test_a_missing_file_says_where_it_belongs(tmp_path, refused):
    with refused(InvalidInput, str(tmp_path / "mnist"), "train-images", "GRADLEAK_DATA"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "nothing"),
        (b"\x00\x00", "not an IDX file"),
        (idx(LABELS), "not an IDX file"),
        (idx(IMAGES)[:9], "header"),
        (idx(IMAGES)[:-1], "truncated"),
        (idx(IMAGES) + b"\x00", "longer"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-20], "truncated"),
        (gzip.compress(idx(IMAGES), mtime=0)[:5], "truncated"),
        (b"\x1f\x8b" + b"\x00" * 50, "corrupted"),
        (b"\x80\x04\x95 a pickle", "not an IDX file"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "announces"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**20, 64, 64) + b"\x00" * 9, "truncated"),
        (bytes((0, 0, 8, 3)) + struct.pack(">3I", 0, 28, 28), "announces"),
    ],
)
def test_damaged_or_foreign_files_are_refused(tmp_path, refused, content, words):
    path = tmp_path / "images"
    path.write_bytes(content)
    with refused(CorruptFile, str(path), words):
        read_idx(path, axes=3)


def test_a_flipped_bit_in_the_compressed_stream_is_noticed(tmp_path, refused):
    content = bytearray(gzip.compress(idx(IMAGES), mtime=0))
    content[len(content) // 2] ^= 1
    (tmp_path / "images.gz").write_bytes(content)
    with refused(CorruptFile, "images.gz"):
        read_idx(tmp_path / "images.gz", axes=3)


def test_every_truncation_is_noticed(tmp_path, survives):
    whole = gzip.compress(idx(IMAGES[:1, :4, :4]), mtime=0)
    path = tmp_path / "images.gz"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert not survives(lambda: read_idx(path, axes=3))


def test_images_without_their_labels_are_refused(tmp_path, refused):
    write_pair(tmp_path / "mnist", images=idx(IMAGES), labels=idx(LABELS[:5]))
    with refused(CorruptFile, "6 images", "5 labels"):
        load("mnist", data_dir=tmp_path)


def test_labels_beyond_the_classes_are_refused(tmp_path, refused):
    write_pair(tmp_path / "mnist", images=idx(IMAGES), labels=idx(LABELS + 5))
    with refused(InvalidInput, "mnist", "14", "0 to 9"):
        load("mnist", data_dir=tmp_path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path, refused):
    with refused(InvalidInput, str(tmp_path)):
        read_idx(tmp_path, axes=3)


@pytest.mark.parametrize(("name", "first"), [("mnist", 5), ("fashion-mnist", 9)])
def test_the_real_files(gradleak_data, name, first):
    data = load(name, data_dir=gradleak_data)
    assert len(data) == 60_000
    assert int(data.labels[0]) == first
    counts = torch.bincount(data.labels)
    assert counts[:3].tolist() == ([5923, 6742, 5958] if name == "mnist" else [6000] * 3)
