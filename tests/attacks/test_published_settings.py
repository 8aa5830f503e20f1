"""Figures the attacks must reach on real data, with the control beside them."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

import gradleak as gl
from gradleak.attacks import DLG, InvertingGradients
from gradleak.data import Dataset, load
from gradleak.mechanisms import FedAvg
from gradleak.models import build
from gradleak.types import Attack, Mechanism, ModelState
from tests.laws.small import stream


def psnrs(
    attack: Attack,
    data: Dataset,
    state: ModelState,
    mechanism: Mechanism,
    *,
    size: int = 1,
    targets: int = 8,
    knows: tuple[str, ...] = ("mechanism", "batch_size"),
) -> tuple[list[float], list[float], list[float]]:
    """PSNR of each target, of its control (the next target's claim), and label accuracy."""
    threat = gl.ThreatModel(frozenset(gl.Fact(k) for k in knows))
    pairs = [
        gl.simulate(
            gl.Scenario(data, state, mechanism, threat, batch_size=size), generator=stream(100 + i)
        )
        for i in range(targets)
    ]
    claims = gl.attack_all(attack, [seen for seen, _ in pairs], seed=0)
    truths = [truth.batch for _, truth in pairs]
    own = [gl.metrics.psnr_db(c.batch, t) for c, t in zip(claims, truths, strict=True)]
    control = [gl.metrics.psnr_db(claims[(i + 1) % targets].batch, t) for i, t in enumerate(truths)]
    labels = [gl.metrics.label_accuracy(c.batch, t) for c, t in zip(claims, truths, strict=True)]
    return own, control, labels


@pytest.mark.parametrize(
    ("size", "median_db"),
    [
        (1, 60),
        pytest.param(2, 50, marks=pytest.mark.slow),
        pytest.param(4, 35, marks=pytest.mark.slow),
    ],
)
def test_dlg_on_digits_with_labels_recovered_jointly(size: int, median_db: float) -> None:
    digits = load("digits")
    state = ModelState.of(build("lenet-tiny", digits.spec, seed=1)).to(torch.float64)
    own, control, labels = psnrs(DLG(restarts=3), digits, state, gl.FedSGD(), size=size)
    assert statistics.median(own) >= median_db
    assert statistics.median(control) < 20
    assert statistics.mean(labels) == 1


def test_inverting_gradients_against_three_local_steps_beats_its_control() -> None:
    """The recipe of FedSGD, unchanged; mean over 4 digits, control the neighbour's claim."""
    digits = load("digits")
    state = ModelState.of(build("convnet", digits.spec, seed=1))
    attack = InvertingGradients(steps=300)
    mechanism = FedAvg(steps=3, learning_rate=0.05)
    own, control, _ = psnrs(attack, digits, state, mechanism, targets=4)
    assert statistics.mean(own) >= statistics.mean(control) + 6


@pytest.mark.slow
def test_inverting_gradients_on_cifar10(gradleak_data: Path) -> None:
    cifar = load("cifar10", data_dir=gradleak_data)
    state = ModelState.of(build("convnet", cifar.spec, seed=1))
    knows = ("mechanism", "batch_size", "labels")
    own, control, _ = psnrs(
        InvertingGradients(steps=1000), cifar, state, gl.FedSGD(), targets=4, knows=knows
    )
    assert statistics.mean(own) >= 20
    assert statistics.mean(control) < 15
