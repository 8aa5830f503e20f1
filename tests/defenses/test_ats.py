"""ATS: every operation against Pillow, which the published code calls, and its draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

import gradleak as gl
from gradleak.data import load
from gradleak.defenses import ATS, build, difference, norm, undefended
from gradleak.defenses.ats import OPERATIONS, Operation, applied, transformed
from gradleak.errors import IntractableLikelihood, InvalidInput, NotApplicable
from gradleak.mechanisms import FedSGD
from gradleak.models import build as build_model
from gradleak.run.preflight import preflight
from gradleak.types import Batch, ModelState
from tests.laws.small import TwoTwins, batch_of, state_of, stream

PUBLISHED = ("3-1-7", "43-18-18", "21-13-3", "7-4-15")

SHIFTED = np.linspace(0, 150 / 331, 10)
RANGES = {
    "shift-x": SHIFTED,
    "shift-y": SHIFTED,
    "shear-y": np.linspace(0, 0.3, 10),
    "rotate": np.linspace(0, 30, 10),
    "posterize": np.round(np.linspace(8, 4, 10)),
    "solarize": np.linspace(256, 0, 10),
}
ENHANCED = np.linspace(0, 0.5, 10)
ENHANCE: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
}


def pillow(operation: Operation, sign: int, image: Image.Image) -> Image.Image:
    m = float(RANGES.get(operation.name, ENHANCED)[operation.level]) * sign
    if operation.name in ENHANCE:
        return ENHANCE[operation.name](image).enhance(1 + m)
    affine, size = Image.Transform.AFFINE, image.size
    match operation.name:
        case "shift-x":
            return image.transform(size, affine, (1, 0, m * size[0], 0, 1, 0))
        case "shift-y":
            return image.transform(size, affine, (1, 0, 0, 0, 1, m * size[1]))
        case "shear-y":
            return image.transform(size, affine, (1, 0, 0, m, 1, 0), Image.Resampling.BICUBIC)
        case "rotate":
            turned = image.convert("RGBA").rotate(m)
            grey = Image.new("RGBA", turned.size, (128,) * 4)
            return Image.composite(turned, grey, turned).convert(image.mode)
        case "posterize":
            return ImageOps.posterize(image, int(m))
        case "solarize":
            return ImageOps.solarize(image, m)
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
    assert operation.name == "invert"
    return ImageOps.invert(image)


def picture(size: int = 32) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A smooth colour picture, so that nothing hinges on a rounded half."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(6 * x + 3 * c) * np.cos(5 * y - c) for c in range(3)]
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    pixels = np.rint(127 + 120 * np.stack(waves, -1)).astype(np.uint8)
    return pixels


DRAWS = [(number, sign) for number in range(50) for sign in OPERATIONS[number].signs]


@pytest.mark.parametrize(("number", "sign"), DRAWS)
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


def test_the_auditor_compares_with_what_the_client_trained_on() -> None:
    digits, rule = load("digits"), ATS("3-1-7")
    state = ModelState.of(build_model("lenet-tiny", digits.spec, seed=0))
    scenario = gl.Scenario(digits, state, rule(FedSGD()), indices=torch.tensor([0]))
    seen, truth = gl.simulate(scenario, generator=stream(3))
    assert not torch.equal(truth.trained_on.inputs, truth.batch.inputs)
    assert norm(difference(FedSGD().mean(state, truth.trained_on), seen.update)) == 0
    assert preflight(scenario, seen, truth, generator=stream(3)) == []


def test_a_wrong_sign_would_be_found() -> None:
    """The planted fault: shifts against Pillow's direction differ by far more than rounding."""
    pixels = picture()
    image = torch.tensor(pixels, dtype=torch.float64).permute(2, 0, 1)[None] / 255
    expected = np.asarray(pillow(OPERATIONS[3], 1, Image.fromarray(pixels)))
    found = applied(((OPERATIONS[3], -1),), image)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() > 50


@pytest.mark.parametrize(
    ("spec", "clue"),
    [
        ("ats:policy=50-1-7", "'50'"),
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
