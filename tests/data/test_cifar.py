"""CIFAR-10's binary format."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from gradleak.data import load
from gradleak.errors import CorruptFile, InvalidInput

RECORDS = np.random.default_rng(0).integers(0, 256, (4, 3073), dtype=np.uint8)
RECORDS[:, 0] = [6, 9, 9, 4]


def test_planes_and_rows_come_back_in_order(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10/data_batch_1.bin").write_bytes(RECORDS[:3].tobytes())
    (tmp_path / "cifar10/data_batch_2.bin.gz").write_bytes(gzip.compress(RECORDS[3:].tobytes()))
    data = load("cifar10", data_dir=tmp_path)
    assert data.spec.shape == (3, 32, 32)
    assert data.labels.tolist() == [6, 9, 9, 4]
    assert data.spec.class_names[6] == "frog"
    row, column = 5, 7
    for channel in range(3):
        assert data.images[1, channel, row, column] == RECORDS[1, 1 + 1024 * channel + 32 * 5 + 7]
    assert torch.equal(data.images[3].flatten(), torch.from_numpy(RECORDS[3, 1:]))


def test_files_made_from_jpeg_stay_out_of_the_lossless_set(tmp_path, refused):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10/jpeg_train_10000.bin").write_bytes(RECORDS.tobytes())
    with refused(InvalidInput, "cifar10", "data_batch_1.bin"):
        load("cifar10", data_dir=tmp_path)
    assert len(load("cifar10-jpeg", data_dir=tmp_path)) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (RECORDS.tobytes()[:-1], "records of 3073"),
        (np.full((2, 3073), 77, dtype=np.uint8).tobytes(), "label 77"),
        (gzip.compress(RECORDS.tobytes())[:-9], "truncated"),
        (gzip.compress(bytes(61_000 * 3073)), "records of 3073"),
        (b"\x80\x02}q\x00(X\x0b\x00", "no CIFAR-10"),
    ],
)
def test_damaged_or_foreign_files_are_refused(tmp_path, content, words):
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10/data_batch_1.bin"
    path.write_bytes(content)
    with pytest.raises(CorruptFile) as caught:
        load("cifar10", data_dir=tmp_path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_the_real_file(gradleak_data):
    data = load("cifar10", data_dir=gradleak_data)
    assert data.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    means = (data.images.double() / 255).mean((0, 2, 3))
    torch.testing.assert_close(
        means, torch.tensor([0.4916, 0.4818, 0.4447]).double(), rtol=0, atol=1e-4
    )
