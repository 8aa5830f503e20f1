"""Arrays in .npz files."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from gradleak.data import load
from gradleak.errors import CorruptFile, InvalidInput

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 6, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        (GREY, GREY[:, None]),
        (GREY.astype(np.int64), GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (np.asfortranarray(COLOUR), COLOUR.transpose(0, 3, 1, 2)),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whole_numbers_come_back_exactly(tmp_path, images, wanted, save):
    save(tmp_path / "set.npz", images=images, labels=LABELS)
    data = load(tmp_path / "set.npz")
    assert np.array_equal(data.images.numpy(), wanted)
    assert data.labels.tolist() == LABELS.tolist()
    assert data.name == "set"
    assert data.spec.classes == 3


@pytest.mark.parametrize("kind", ["float32", "float64", ">f4"])
def test_floating_point_in_unit_range(tmp_path, kind):
    images = RNG.random((5, 8, 8)).astype(kind)
    np.savez(tmp_path / "set.npz", x_train=images, y_train=LABELS.astype(np.uint8))
    data = load(str(tmp_path / "set.npz"))
    assert data.images.dtype == torch.float32
    np.testing.assert_allclose(data.batch([2]).inputs[0, 0].numpy(), images[2], atol=1e-7)


def test_medmnist_layout_has_a_column_of_labels(tmp_path):
    (tmp_path / "medical").mkdir()
    np.savez(
        tmp_path / "medical/pneumoniamnist.npz",
        train_images=GREY,
        train_labels=LABELS[:, None] > 0,
    )
    with pytest.raises(InvalidInput, match="bool"):
        load("pneumoniamnist", data_dir=tmp_path)
    np.savez(
        tmp_path / "medical/pneumoniamnist.npz",
        train_images=GREY,
        train_labels=(LABELS[:, None] > 0).astype(np.uint8),
        val_images=GREY[:1],
    )
    data = load("pneumoniamnist", data_dir=tmp_path)
    assert data.spec.class_names == ("normal", "pneumonia")
    assert data.labels.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": GREY, "labels": LABELS}, "pictures"),
        ({}, "nothing"),
        ({"images": GREY, "labels": LABELS[:4]}, "labels"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "at least one"),
        ({"images": GREY[0], "labels": LABELS}, "(6, 7)"),
        ({"images": RNG.random((5, 4, 6, 7)), "labels": LABELS}, "(5, 4, 6, 7)"),
        ({"images": GREY / 1.0, "labels": LABELS}, "0..1"),
        ({"images": np.full((5, 6, 6), np.nan), "labels": LABELS}, "nan"),
        ({"images": GREY.astype(int) - 200, "labels": LABELS}, "0..255"),
        ({"images": GREY, "labels": LABELS / 2}, "whole numbers"),
        ({"images": GREY, "labels": LABELS - 1}, "from -1"),
        ({"images": GREY, "labels": LABELS * 10**12}, "label 2000000000000"),
        ({"images": GREY, "labels": np.eye(5, dtype=int)}, "(5, 5)"),
        ({"images": GREY.astype("S3"), "labels": LABELS}, "|S3"),
        ({"images": GREY * 1j, "labels": LABELS}, "complex"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(tmp_path, refused, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)
    with refused(InvalidInput, words):
        load(tmp_path / "set.npz")


class Planted:
    """Unpickling it would set `ran`."""

    ran = False

    def __reduce__(self):
        return (setattr, (Planted, "ran", True))


def test_an_object_array_is_never_unpickled(tmp_path, refused):
    images = np.empty(5, dtype=object)
    images[:] = [Planted() for _ in range(5)]
    np.savez(tmp_path / "set.npz", images=images, labels=LABELS)
    with refused(CorruptFile, "images", "pickle"):
        load(tmp_path / "set.npz")
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(Planted()))
    with refused(CorruptFile, "raw.npz"):
        load(tmp_path / "raw.npz")
    assert not Planted.ran


def member(shape: tuple[int, ...], *, stored: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue() + stored


@pytest.mark.parametrize("shape", [(10**12, 28, 28), (100, 28, 28), (1, 1, 1), (-5, 28, 28)])
def test_a_header_that_lies_about_the_size_is_refused(tmp_path, refused, shape):
    with zipfile.ZipFile(tmp_path / "set.npz", "w") as archive:
        archive.writestr("images.npy", member(shape, stored=bytes(99)))
        archive.writestr("labels.npy", member((5,), stored=bytes(5)))
    with refused(CorruptFile, "images", "99"):
        load(tmp_path / "set.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not an archive at all", bytes(500)])
def test_foreign_files_are_refused(tmp_path, refused, content):
    (tmp_path / "set.npz").write_bytes(content)
    with refused(CorruptFile, "set.npz"):
        load(tmp_path / "set.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncations_and_flipped_bytes_never_escape_as_other_errors(tmp_path, survives, save):
    path = tmp_path / "set.npz"
    save(path, images=GREY, labels=LABELS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert not survives(lambda: load(path))
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        survives(lambda: load(path))


def test_the_real_file(gradleak_data):
    data = load("pneumoniamnist", data_dir=gradleak_data)
    assert torch.bincount(data.labels).tolist() == [1214, 3494]
    assert data.images.shape == (4708, 1, 28, 28)
