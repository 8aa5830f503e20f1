"""Pictures: chosen by rule, aligned, decoded back to the pixels that were stored."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gradleak.report import pictures


def decoded(picture: pictures.Picture) -> np.ndarray:
    head, _, body = picture.uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_image_survives_the_round_trip(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, channels, 8, 6)) / 255
    back = decoded(pictures.mosaic(image)).reshape(8, 6, channels)
    assert (back == np.round(image[0].transpose(1, 2, 0) * 255)).all()


def test_values_outside_the_unit_interval_are_clamped() -> None:
    image = np.array([[[[-3.0, 7.0]]]])
    assert decoded(pictures.mosaic(image)).tolist() == [[0, 255]]


def test_a_batch_becomes_a_near_square_with_transparent_gaps() -> None:
    picture = pictures.mosaic(np.ones((4, 3, 8, 8)))
    assert (picture.width, picture.height) == (17, 17)
    assert decoded(picture)[8, :, 3].max() == 0


def test_large_images_are_reduced() -> None:
    picture = pictures.mosaic(np.zeros((1, 1, 512, 256)))
    assert (picture.width, picture.height) == (64, 128)


def test_nothing_finite_gives_no_picture() -> None:
    assert pictures.mosaic(np.full((1, 1, 4, 4), math.nan)).uri == ""


def test_worst_median_and_random_are_chosen_by_rule() -> None:
    psnr = [10.0, 50.0, 20.0, math.nan, 30.0, math.inf]
    picks = pictures.chosen(psnr, key="some finding")
    assert dict(picks)["Worst"] == 5
    assert dict(picks)["Median"] == 2
    assert dict(picks)["Random"] not in (5, 2)
    assert picks == pictures.chosen(psnr, key="some finding")
    others = {dict(pictures.chosen(psnr, key=f"finding {i}"))["Random"] for i in range(60)}
    assert others == {0, 1, 3, 4}


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_targets_are_each_shown_once(n: int) -> None:
    picks = pictures.chosen([float(i) for i in range(n)], key="x")
    assert sorted(index for _, index in picks) == list(range(n))


def stored(directory: Path, **tensors: torch.Tensor) -> str:
    save_file(tensors, directory / "t.safetensors")
    return "t.safetensors"


def test_claims_are_shown_in_the_order_of_the_truth(tmp_path: Path) -> None:
    truth = torch.rand(2, 4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    claim = truth.flip(1).clone()
    claim[1, 0] = math.nan
    path = stored(tmp_path, truth=truth, claim=claim)
    images = pictures.load(tmp_path, [(path, 0), (path, 1)]).images
    assert np.allclose(images["claim"][0], truth[0])
    assert np.allclose(images["claim"][1][:3], truth[1][:3])
    assert np.isnan(images["claim"][1][3]).all()


def test_a_target_without_a_file_keeps_its_place(tmp_path: Path) -> None:
    path = stored(tmp_path, truth=torch.ones(1, 1, 1, 4, 4), claim=torch.ones(1, 1, 1, 4, 4))
    images = pictures.load(tmp_path, [(path, 0), (None, 0)]).images
    assert np.isfinite(images["claim"][0]).all()
    assert np.isnan(images["claim"][1]).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "missing or damaged"), (b"\x80\x04 a pickle", "missing or damaged")],
)
def test_an_unreadable_file_is_only_said(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content:
        (tmp_path / "t.safetensors").write_bytes(content)
    answer = pictures.load(tmp_path, [("t.safetensors", 0)])
    assert not answer.images
    assert words in answer.problem


def test_paths_may_not_lead_outside(tmp_path: Path) -> None:
    inside = tmp_path / "out"
    inside.mkdir()
    stored(tmp_path, truth=torch.ones(1, 1, 1, 4, 4))
    assert "outside" in pictures.load(inside, [("../t.safetensors", 0)]).problem


def test_tensors_that_are_no_images_give_no_pictures(tmp_path: Path) -> None:
    path = stored(tmp_path, truth=torch.ones(3, 2, 7))
    assert not pictures.load(tmp_path, [(path, 0)]).images
    path = stored(tmp_path, truth=torch.ones(1, 1, 1, 4, 4))
    assert not pictures.load(tmp_path, [(path, 5)]).images
