"""The MATLAB file of the Olivetti faces."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.io import savemat

from gradleak.data import load
from gradleak.data.olivetti import read_olivetti
from gradleak.errors import CorruptFile, InvalidInput

FACES = np.random.default_rng(0).integers(0, 256, (20, 64, 64), dtype=np.uint8)
COLUMNS = FACES.transpose(0, 2, 1).reshape(20, 4096).T


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_columns_become_upright_images(tmp_path, compressed, kind):
    (tmp_path / "faces").mkdir()
    savemat(
        tmp_path / "faces/olivettifaces.mat",
        {"faces": COLUMNS.astype(kind), "other": np.eye(3)},
        do_compression=compressed,
    )
    data = load("olivetti", data_dir=tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), FACES)
    assert data.labels.tolist() == [0] * 10 + [1] * 10


@pytest.mark.parametrize(
    "contents",
    [
        {"eyes": np.eye(4)},
        {"faces": np.zeros((64, 64), dtype=np.uint8)},
        {"faces": np.zeros((4096, 5), dtype=np.uint8)},
        {"faces": "a text"},
        {"faces": np.full((4096, 10), 0.5)},
        {"faces": np.full((4096, 10), np.nan)},
        {"faces": np.zeros((4096, 10)) * 1j},
        {"faces": [np.zeros(3), "cell"]},
    ],
)
def test_other_contents_are_refused(tmp_path, refused, contents):
    path = tmp_path / "o.mat"
    savemat(path, contents)
    with refused(CorruptFile, str(path), "faces"):
        read_olivetti(path)


@pytest.mark.parametrize("content", [b"", b"MATLAB", b"\x80\x04K\x01.", b"\x00" * 400, b"x" * 999])
def test_foreign_files_are_refused(tmp_path, refused, content):
    path = tmp_path / "o.mat"
    path.write_bytes(content)
    with refused(CorruptFile, str(path)):
        read_olivetti(path)


def test_truncated_and_corrupted_files_are_refused(tmp_path, survives):
    path = tmp_path / "o.mat"
    savemat(path, {"faces": COLUMNS})
    whole = path.read_bytes()
    for length in (100, 127, 130, 140, 180, 190, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert not survives(lambda: read_olivetti(path))
    for position in range(120, 200):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        survives(lambda: read_olivetti(path))


def test_a_missing_file_says_where_it_belongs(tmp_path, refused):
    with refused(InvalidInput, "olivettifaces.mat"):
        load("olivetti", data_dir=tmp_path)


def test_the_real_file(gradleak_data):
    data = load("olivetti", data_dir=gradleak_data)
    assert data.images.shape == (400, 1, 64, 64)
    assert data.spec.classes == 40
    faces = data.images.flatten(1).double()
    correlation = np.corrcoef(faces.numpy())
    same = np.equal.outer(data.labels.numpy(), data.labels.numpy())
    assert correlation[same].mean() > correlation[~same].mean() + 0.2
