"""The closed form of a first linear layer: exact in its range, silent just outside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.attacks import LinearLayer
from gradleak.data import load
from gradleak.defenses import Clip, TopK
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models import build
from gradleak.types import Mechanism, ModelState, Reconstruction, Update
from tests.laws.small import stream

EXACT_DB = 120.0


def attack(
    model: nn.Module, indices: list[int], mechanism: Mechanism | None = None
) -> tuple[Reconstruction, float]:
    digits = load("digits")
    state = ModelState.of(model).to(torch.float64)
    scenario = gl.Scenario(
        digits,
        state,
        mechanism or FedSGD(),
        batch_size=len(indices),
        indices=torch.tensor(indices),
    )
    seen, truth = gl.simulate(scenario, generator=stream(0))
    claim = LinearLayer()(seen, generator=stream(1))
    return claim, gl.metrics.psnr_db(claim.batch, truth.batch)


def mlp() -> nn.Module:
    return build("mlp", load("digits").spec, seed=3)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    "mechanism",
    [FedSGD(), FedAvg(steps=4, learning_rate=0.2), Clip(1e-3)(FedSGD())],
    ids=["fedsgd", "fedavg", "clip"],
)
def test_one_example_through_an_mlp_is_exact(index: int, mechanism: Mechanism) -> None:
    claim, psnr = attack(mlp(), [index], mechanism)
    assert claim.status == "solved"
    assert psnr > EXACT_DB


def test_top_k_leaves_enough_rows_of_each_pixel() -> None:
    _, psnr = attack(mlp(), [0], TopK(0.5)(FedSGD()))
    assert psnr > EXACT_DB


class NoBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8, bias=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x.flatten(1))))


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1) ** 2)


class Cropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)[:, :32])


@pytest.mark.parametrize(
    ("model", "why"),
    [(NoBias, "no bias"), (Squared, "not an affine image"), (Cropped, "every input entry")],
)
def test_no_solution_just_outside_the_theory(model: type[nn.Module], why: str) -> None:
    claim, _ = attack(model(), [0])
    assert claim.status == "no_solution"
    assert why in claim.message


def test_no_solution_behind_a_convolution_or_for_a_batch() -> None:
    claim, _ = attack(build("lenet-tiny", load("digits").spec, seed=0), [0])
    assert claim.status == "no_solution"
    assert "Conv2d" in claim.message
    claim, _ = attack(mlp(), [0, 1])
    assert claim.status == "no_solution"
    assert "one example" in claim.message


def test_no_solution_when_no_unit_is_active() -> None:
    model = mlp()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.in_features == 64:
                layer.bias.fill_(-1e3)
    claim, _ = attack(model, [0])
    assert claim.status == "no_solution"
    assert "no unit is active" in claim.message


def test_noise_degrades_gracefully_and_stays_in_the_box() -> None:
    digits = load("digits")
    state = ModelState.of(mlp())
    clean = FedSGD().mean(state, digits.batch([0]))
    noisy = Update(
        {k: v + 0.01 * torch.randn(v.shape, generator=stream(2)) for k, v in clean.values.items()},
        "gradient",
    )
    seen = gl.observe(state, update=noisy.values, data=digits.spec, batch_size=1)
    claim = LinearLayer()(seen, generator=stream(1))
    assert float(claim.batch.inputs.min()) >= 0
    assert float(claim.batch.inputs.max()) <= 1
