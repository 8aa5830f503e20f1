"""Continuation: better than the published recipe on ReLU, exact on smooth networks, honest else."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.attacks import Continuation, InvertingGradients
from gradleak.attacks.recipes import continuation
from gradleak.data import load
from gradleak.errors import NotApplicable
from gradleak.models import build
from gradleak.types import Attack, ModelState, Observation
from tests.laws.small import stream


def seen_digits(
    indices: list[int], model: nn.Module | None = None, *, state: ModelState | None = None
) -> tuple[Observation, gl.Batch]:
    """What a server sees of a batch of digits, labels not granted."""
    digits = load("digits")
    state = state or ModelState.of(model or build("convnet", digits.spec, seed=1))
    scenario = gl.Scenario(digits, state, batch_size=len(indices), indices=torch.tensor(indices))
    seen, truth = gl.simulate(scenario, generator=stream(0))
    return seen, truth.batch


def psnr(attack: Attack, seen: Observation, truth: gl.Batch) -> float:
    return gl.metrics.psnr_db(attack(seen, generator=stream(3)).batch, truth)


def gelu() -> nn.Module:
    model = build("convnet", load("digits").spec, seed=1)
    assert isinstance(model, nn.Sequential)
    for place, layer in enumerate(model):
        if isinstance(layer, nn.ReLU):
            model[place] = nn.GELU()
    return model


@pytest.mark.slow
def test_it_beats_inverting_gradients_on_a_relu_network() -> None:
    """Median over 3 digits, ten decibels ahead with as many gradient evaluations."""
    pairs = [seen_digits([index]) for index in (20, 21, 22)]
    ours = [psnr(Continuation(steps=400), *pair) for pair in pairs]
    theirs = [psnr(InvertingGradients(steps=600), *pair) for pair in pairs]
    assert statistics.median(ours) >= statistics.median(theirs) + 10


def test_a_network_without_kinks_is_solved_without_a_path() -> None:
    seen, truth = seen_digits([30], gelu())
    claim = Continuation(steps=300)(seen, generator=stream(3))
    assert claim.objective < 1e-8
    assert gl.metrics.psnr_db(claim.batch, truth) > 50


def test_two_examples_of_one_class_are_told_apart() -> None:
    """Labels unknown. Without separated features both become their mean, far below 20 dB."""
    digits = load("digits")
    twins = torch.nonzero(digits.labels == 4)[:2, 0].tolist()
    seen, truth = seen_digits(twins)
    claim = Continuation(steps=400)(seen, generator=stream(3))
    assert claim.batch.labels.tolist() == [4, 4]
    assert gl.metrics.psnr_db(claim.batch, truth) > 25


def test_inputs_of_the_head_tell_repeated_classes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight digits of five classes: ten decibels more than as many steps without their space."""
    digits = load("digits")
    rows = [torch.nonzero(digits.labels == label)[:3, 0].tolist() for label in range(10)]
    seen, truth = seen_digits([rows[label].pop(0) for label in (0, 1, 1, 1, 2, 5, 5, 9)], gelu())
    claim = Continuation(steps=60)(seen, generator=stream(3))
    monkeypatch.setattr(continuation, "row_space", lambda *_: None)
    without = Continuation(steps=82)(seen, generator=stream(3))
    assert without.evaluations >= 0.95 * claim.evaluations
    gain = gl.metrics.psnr_db(claim.batch, truth) - gl.metrics.psnr_db(without.batch, truth)
    assert gain > 10


def test_known_labels_keep_their_order() -> None:
    digits = load("digits")
    seen, truth = seen_digits([15, 3, 8])
    known = replace(seen, knowledge=replace(seen.knowledge, labels=truth.labels))
    claim = Continuation(steps=6)(known, generator=stream(3))
    assert torch.equal(claim.batch.labels, digits.labels[[15, 3, 8]])


def disturbed(seen: Observation, *names: str) -> Observation:
    """The same with noise of a thousandth on these tensors, or on all."""
    values = {
        k: v + 1e-3 * torch.randn(v.shape, generator=stream(5)) if k in names or not names else v
        for k, v in seen.update.values.items()
    }
    exchange = replace(seen.exchanges[0], update=replace(seen.update, values=values))
    return replace(seen, exchanges=(exchange,))


def test_targets_known_at_different_depths_end_as_they_would_alone() -> None:
    """Nothing separates in the first; the second separates at its head, the third is peeled."""
    state = ModelState.of(build("convnet", load("digits").spec, seed=1))
    clean = [seen_digits([index], state=state)[0] for index in (1, 2, 3)]
    group = [disturbed(clean[0]), disturbed(clean[1], "7.weight"), clean[2]]
    attack = Continuation(steps=6, stages=2, restarts=2)
    streams = [stream(seed) for seed in (7, 8, 9)]
    together = attack.on_group(group, generators=streams, engine="loop")
    for seen, seed, claim in zip(group, (7, 8, 9), together, strict=True):
        alone = attack.on_group([seen], generators=[stream(seed)], engine="loop")[0]
        assert torch.equal(alone.batch.inputs, claim.batch.inputs)
        assert alone.objective == claim.objective
        assert alone.evaluations == claim.evaluations


def test_the_objective_is_that_of_the_network_itself() -> None:
    seen, truth = seen_digits([1])
    attack = Continuation(steps=16)
    claim = attack(seen, generator=stream(1))
    assert attack.objective(seen)(truth) < 1e-12
    assert attack.objective(seen)(claim.batch) == pytest.approx(claim.objective, rel=1e-9)


def test_kinks_without_a_smooth_copy_are_not_applicable() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Hardswish(), nn.Linear(32, 10))
    seen, _ = seen_digits([1], model)
    with pytest.raises(NotApplicable, match="hardswish"):
        Continuation(steps=4)(seen, generator=stream(1))
