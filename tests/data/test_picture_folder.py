"""Folders of pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gradleak.data import load
from gradleak.errors import CorruptFile, InvalidInput

RNG = np.random.default_rng(0)


def picture(path, *, size=(40, 36), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = (3,) if mode == "RGB" else ()
    pixels = RNG.integers(0, 256, (size[1], size[0], *depth), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def test_png_of_the_right_size_is_read_exactly(tmp_path):
    pixels = {
        name: picture(tmp_path / "set" / name, size=(12, 12))
        for name in ("cat/a.png", "cat/b.PNG", "dog/c.png")
    }
    (tmp_path / "set/README.txt").write_text("not a picture")
    (tmp_path / "set/cat/.hidden.png").write_bytes(b"")
    (tmp_path / "set/empty").mkdir()
    data = load(tmp_path / "set")
    assert data.name == "set"
    assert data.spec.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1]
    for image, original in zip(data.images, pixels.values(), strict=True):
        assert np.array_equal(image.numpy(), original.transpose(2, 0, 1))


def test_jpeg_and_png_of_all_sizes_become_squares_of_at_most_32(tmp_path):
    picture(tmp_path / "a.jpg", size=(200, 90), quality=90)
    picture(tmp_path / "b.png", size=(33, 70))
    data = load(tmp_path)
    assert data.images.shape == (2, 3, 32, 32)
    picture(tmp_path / "c.png", size=(20, 24), mode="L")
    assert load(tmp_path).images.shape == (3, 3, 20, 20)
    assert load(f"{tmp_path}:size=48").images.shape == (3, 3, 48, 48)


def test_a_flat_folder_is_one_class_of_two_so_that_its_gradient_exists(tmp_path):
    picture(tmp_path / "faces/a.png")
    picture(tmp_path / "faces/b.png")
    data = load(tmp_path / "faces")
    assert data.labels.tolist() == [0, 0]
    assert data.spec.classes == 2
    assert data.spec.class_names == ("faces", "other")


def test_grey_pictures_have_one_channel(tmp_path):
    pixels = picture(tmp_path / "a.png", size=(9, 9), mode="L")
    picture(tmp_path / "b.jpg", size=(9, 9), mode="L")
    data = load(tmp_path)
    assert data.images.shape == (2, 1, 9, 9)
    assert np.array_equal(data.images[0, 0].numpy(), pixels)


def test_the_centre_is_kept_and_orientation_is_honoured(tmp_path):
    strip = np.zeros((8, 24), dtype=np.uint8)
    strip[:, 8:16] = 255
    Image.fromarray(strip).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:4] = 255
    Image.fromarray(half).save(tmp_path / "b.png", exif=exif)
    data = load(tmp_path)
    assert data.images[0].min() == 255
    assert data.images[1, 0, 0].max() == 0
    assert data.images[1, 0, 7].min() == 255


def damage(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_damaged_pictures_are_named(tmp_path, refused, suffix):
    picture(tmp_path / f"a{suffix}")
    bad = tmp_path / f"b{suffix}"
    whole = (tmp_path / f"a{suffix}").read_bytes()
    for content in (b"", b"plain text", whole[:20], whole[: len(whole) // 2], b"\x80\x04K\x01."):
        bad.write_bytes(content)
        with refused(CorruptFile, bad.name):
            load(tmp_path)


def test_a_picture_of_absurd_size_is_refused_by_its_header(tmp_path, refused):
    # A PNG header of 60000 x 60000 RGB pixels, with a correct checksum and no content.
    import struct
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    with refused(CorruptFile, "bomb.png"):
        load(tmp_path)


def test_more_than_eight_bits_are_refused(tmp_path, refused):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with refused(InvalidInput, "deep.png", "8"):
        load(tmp_path)


def test_folders_that_are_no_dataset(tmp_path, refused):
    with refused(InvalidInput, "no pictures"):
        load(tmp_path)
    picture(tmp_path / "x/y/z.png")
    with refused(InvalidInput, "no pictures"):
        load(tmp_path)
    picture(tmp_path / "a.png")
    picture(tmp_path / "x/b.png")
    with refused(InvalidInput, "both"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("size=3", "4 to 1024"),
        ("size=100000", "4 to 1024"),
        ("size=big", "whole number"),
        ("sise=32", "did you mean 'size'"),
        ("size=8,size=9", "twice"),
    ],
)
def test_fields_are_checked(tmp_path, refused, field, words):
    picture(tmp_path / "a.png")
    with refused(InvalidInput, words):
        load(f"{tmp_path}:{field}")


def test_the_real_folders(gradleak_data):
    faces = load(gradleak_data / "faces/lfw-color100")
    assert faces.images.shape == (474, 3, 32, 32)
    assert faces.spec.classes == 12
    kodak = load(f"{gradleak_data / 'photos/kodak'}:size=64")
    assert kodak.images.shape == (24, 3, 64, 64)
