"""ATS: every operation against Pillow, which the published code calls, and its draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from gradleak.data import load
from gradleak.defenses import ATS, build, undefended
from gradleak.defenses.ats import OPERATIONS, Operation, applied, transformed
from gradleak.errors import IntractableLikelihood, InvalidInput, NotApplicable
from gradleak.mechanisms import FedSGD
from gradleak.types import Batch
from tests.laws.small import TwoTwins, batch_of, state_of, stream

PUBLISHED = ("3-1-7", "43-18-18", "21-13-3", "7-4-15")

RANGES = {"shift-x": np.linspace(0, 150 / 331, 10), "shift-y": np.linspace(0, 150 / 331, 10)}
ENHANCED = np.linspace(0, 0.5, 10)


def pillow(operation: Operation, sign: int, image: Image.Image) -> Image.Image:
    m = float(RANGES.get(operation.name, ENHANCED)[operation.level]) * sign
    if operation.name.startswith("shift"):
        x, y = (m * image.size[0], 0.0) if operation.name == "shift-x" else (0.0, m * image.size[1])
        return image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))
    enhance: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
        "brightness": ImageEnhance.Brightness,
    }
    return enhance[operation.name](image).enhance(1 + m)


def picture(size: int = 32) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A smooth colour picture, so that nothing hinges on a rounded half."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(6 * x + 3 * c) * np.cos(5 * y - c) for c in range(3)]
    return np.rint(127 + 120 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("number", sorted(OPERATIONS))
def test_every_operation_is_pillows_up_to_rounding(number: int, sign: int) -> None:
    pixels = picture()
    expected = np.asarray(pillow(OPERATIONS[number], sign, Image.fromarray(pixels)))
    image = torch.tensor(pixels, dtype=torch.float64).permute(2, 0, 1)[None] / 255
    found = applied(((OPERATIONS[number], sign),), image)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() <= 1.6


@pytest.mark.parametrize("policy", PUBLISHED)
def test_published_policies_are_differentiable_and_stay_in_the_box(policy: str) -> None:
    image = torch.rand((1, 3, 16, 16), generator=stream(0), dtype=torch.float64)
    image.requires_grad_()
    for outcome in ATS(policy).outcomes:
        made = applied(outcome, image)
        assert float(made.detach().min()) >= 0
        assert float(made.detach().max()) <= 1
        (slope,) = torch.autograd.grad(made.sum(), image)
        assert slope.isfinite().all()
        assert slope.any()


def test_a_hybrid_draws_each_policy_and_sign_equally_often() -> None:
    """n = 1600 over 16 outcomes; chi-square with 15 degrees, α = 1e-6 at 58.9."""
    rule, source = ATS("3-1-7/43-18-18"), stream(0)
    outcomes = rule.outcomes
    assert len(set(outcomes)) == 16
    counts = torch.zeros(16)
    for _ in range(1600):
        counts[outcomes.index(rule.draw(source))] += 1
    assert float(((counts - 100) ** 2 / 100).sum()) < 58.9


def test_the_update_is_the_gradient_of_the_transformed_batch() -> None:
    state, batch, rule = state_of(TwoTwins), batch_of(3), ATS("7-4-15")
    update = rule(FedSGD()).sample(state, batch, generator=stream(4))
    source = stream(4)
    trained_on = transformed(batch, [rule.draw(source) for _ in range(3)])
    expected = FedSGD().mean(state, trained_on)
    assert all(torch.equal(v, expected.values[k]) for k, v in update.values.items())
    # The attack's claim is the transformed batch: there it explains the update exactly.
    predicted = rule(FedSGD()).predict(update, state, trained_on)
    assert all(torch.equal(v, predicted.values[k]) for k, v in update.values.items())
    assert undefended(rule(FedSGD())) == FedSGD()


def test_the_mean_needs_few_combinations() -> None:
    with pytest.raises(IntractableLikelihood, match="3 images"):
        ATS()(FedSGD()).mean(state_of(TwoTwins), batch_of(3))


@pytest.mark.parametrize("policy", ["3-1-7", "21-13-3"])
def test_a_shift_is_undone_where_pixels_survived(policy: str) -> None:
    rule = ATS(policy)
    image = load("digits").batch([0]).inputs.double() * 0 + torch.rand(
        (1, 1, 8, 8), generator=stream(2), dtype=torch.float64
    )
    image = 0.2 + 0.6 * image
    for outcome in rule.outcomes:
        moves = tuple(s for s in outcome if s[0].name.startswith("shift"))
        back = rule.restored(applied(moves, image))
        same = (back - image).abs() < 1e-12
        seen: Tensor = applied(moves, torch.ones_like(image))
        assert int(same.sum()) == int(seen.sum())
        assert torch.equal(back[~same], torch.full_like(back[~same], 0.5))


def test_a_wrong_sign_would_be_found() -> None:
    """The planted fault: undoing the shift the other way keeps fewer of the pixels."""
    image = 0.2 + 0.6 * torch.rand((1, 1, 12, 12), generator=stream(2), dtype=torch.float64)
    moved = applied(((OPERATIONS[3], 1),), image)
    wrong = applied(((OPERATIONS[3], 1),), moved)
    assert int((wrong == image).sum()) == 0
    right = ATS("3-3-3").restored(moved)
    assert int((right == image).sum()) == 12 * (12 - math.floor(150 / 331 * 12 + 0.5))


@pytest.mark.parametrize(
    ("spec", "clue"),
    [
        ("ats:policy=9-1-7", "'9'"),
        ("ats:policy=3-1-7/3", "one length"),
        ("ats:policy=3--7", "''"),
        ("ats:policy=x", "'x'"),
    ],
)
def test_a_bad_policy_says_what_was_expected(spec: str, clue: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build(spec)
    assert clue in str(error.value)


def test_other_data_than_images_is_refused() -> None:
    flat = Batch(torch.rand((1, 16), dtype=torch.float64), torch.tensor([0]))
    with pytest.raises(NotApplicable, match="images"):
        ATS()(FedSGD()).sample(state_of(TwoTwins), flat, generator=stream(0))
