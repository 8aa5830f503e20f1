"""The search for policies: both scores against loops, and the order of what is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gradleak.data import load
from gradleak.defenses import ATS
from gradleak.defenses.ats_search import accuracy_score, privacy_score, search
from gradleak.errors import InvalidInput
from gradleak.models import build
from gradleak.types import Batch, ModelState
from tests.laws.small import TwoTwins, batch_of, state_of, stream

STATE = state_of(TwoTwins)
BLANK = "39-39-39"  # factor 1: the image as it is


def logits(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return torch.func.functional_call(STATE.model, params, (x,))  # type: ignore[no-any-return]


def test_privacy_is_the_area_under_cosines_along_the_way_to_the_image() -> None:
    batch = batch_of(2)
    found = privacy_score(STATE, BLANK, batch, generator=stream(1))
    source = stream(1)
    ATS(BLANK).encode(STATE, batch, source)
    noise = torch.rand(batch.inputs.shape[1:], generator=source).double()

    def gradient(x: Tensor, y: Tensor) -> list[Tensor]:
        params = {k: v.clone().requires_grad_() for k, v in STATE.params.items()}
        loss = cross_entropy(logits(x[None], params), y[None])
        return list(torch.autograd.grad(loss, list(params.values())))

    areas = []
    for x, y in zip(batch.inputs, batch.labels, strict=True):
        at_end, curve = gradient(x, y), []
        for t in np.linspace(0, 1, 21):
            here = gradient(t * x + (1 - t) * noise, y)
            pairs = zip(here, at_end, strict=True)
            curve.append(np.mean([float((a * b).sum() / a.norm() / b.norm()) for a, b in pairs]))
        areas.append(np.trapezoid(curve, dx=0.05))
    assert found == pytest.approx(np.mean(areas), rel=1e-9)


def test_accuracy_is_the_published_score_of_the_jacobians_correlation() -> None:
    batch = batch_of(12)
    found = accuracy_score(STATE, BLANK, batch, runs=2, generator=stream(0))
    scores = []
    for part in batch.inputs.chunk(2):
        x = part.clone().requires_grad_()
        rows = torch.autograd.grad(logits(x, dict(STATE.params)).sum(), x)[0].flatten(1).numpy()
        v = np.linalg.eigvalsh(np.corrcoef(rows)) + 1e-5
        scores.append(-np.sum(np.log(v) + 1 / v))
    assert found == pytest.approx(np.mean(scores), rel=1e-4)


def test_identical_images_score_worse_than_different_ones() -> None:
    batch = batch_of(6)
    alike = Batch(batch.inputs[:1].repeat(6, 1, 1, 1), batch.labels)
    scores = [accuracy_score(STATE, BLANK, b, runs=1, generator=stream(0)) for b in (batch, alike)]
    assert scores[1] < scores[0]


def test_the_most_private_of_the_accurate_half_come_first() -> None:
    digits = load("digits")
    state = ModelState.of(build("lenet-tiny", digits.spec, seed=0))
    public = digits.batch(torch.arange(20))
    found = search(state, state, public, candidates=6, images=2, runs=1, generator=stream(0))
    again = search(state, state, public, candidates=6, images=2, runs=1, generator=stream(0))
    assert found == again
    assert len(found) == 3
    assert [s.privacy for s in found] == sorted(s.privacy for s in found)
    ATS("/".join(s.policy for s in found))  # a hybrid
    with pytest.raises(InvalidInput, match="accurate=0"):
        search(state, state, public, accurate=0, generator=stream(0))
